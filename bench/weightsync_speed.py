"""Weight transfer between two processes, per transport: ``python -m zerokl.bench.weightsync_speed``.

The trainer's layout is Megatron's, the engine's SGLang's, so the fused query-key-value weights really are rearranged.
Medians of transfers after four that warm up (files and registered buffers take turns). A trainer writes each version
where its transport says (`WeightSource.renew`); `ipc-copying` is `ipc` with one that does not. In seconds:

    move     the phase TRANSFER, from the order to the last answer of a participant: the way of the bytes, the digests
             at the sender, and with `ipc` those at the receiver, which run while the rest is still on its way
    verify   the phase VERIFY: whatever digests are left at the receiver, and their comparison
    total    the whole call: all phases, the confirmation that the engine serves again included
    of copy  bytes / move, as a share of what a plain copy of that size does on all cores, measured in the same run

The wire forms travel by the first transport, in a model of about the same size whose sides are whole blocks of 128.
"""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.layout import Layout
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.model_shape import ModelShape, read_shape
from zerokl.weightsync.plan import Batch, Copy
from zerokl.weightsync.protocol import Phase
from zerokl.weightsync.quantised import FORMS, quantise, receiving_layout, sending_layout
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, disk, ipc, rdma
from zerokl.weightsync.transports.base import Buffers, Source, Target
from zerokl.weightsync.transports.copies import target_digests

COPYING = "ipc-copying"
_WARM_UP = 4
_WIRE_MODEL = ModelShape(
    vocabulary=49152, hidden=1024, ffn=2816, layers=8, heads=16, kv_heads=4, head_dim=64, tied=True
)


class _Idle:
    """An engine with nothing to do but remember when it was paused and when it served again."""

    def __init__(self) -> None:
        self.paused_s = self._since = 0.0

    def pause(self, in_flight: str) -> None:  # noqa: ARG002
        self._since = time.perf_counter()

    def install(self, version: str, buffers: Buffers) -> None: ...

    def restore(self, version: str | None, buffers: Buffers) -> None: ...

    def resume(self, version: str) -> None:  # noqa: ARG002
        self.paused_s = time.perf_counter() - self._since


@dataclass(frozen=True)
class Speed:
    """Medians of one transport, in seconds."""

    nbytes: int
    copied_bytes: int
    move: float
    verify: float
    total: float
    pause: float

    def row(self, name: str, copy_gb_per_s: float) -> str:
        rate = self.nbytes / self.move / 1e9
        return (
            f"{name:>14}  {self.nbytes / 1e6:7.1f}  {self.move:7.4f}  {rate:6.2f}  {rate / copy_gb_per_s:7.0%}"
            f"  {self.verify:8.4f}  {self.verify / self.total:6.1%}  {self.total:7.4f}  {self.pause * 1e3:8.1f}"
            f"  {self.copied_bytes / self.nbytes:6.2f}"
        )


HEADER = (
    f"{'':>14}  {'MB':>7}  {'move s':>7}  {'GB/s':>6}  {'of copy':>7}  {'verify s':>8}  {'share':>6}  {'total s':>7}"
    f"  {'pause ms':>8}  {'copies':>6}"
)


def _ends(name: str, folder: Path) -> tuple[Source, Target]:
    if name == "rdma":
        return rdma.RdmaSource(), rdma.RdmaTarget()
    if name == "collective":
        return collective.CollectiveSource(folder, ranks=(1, 1)), collective.CollectiveTarget(folder, ranks=(1, 1))
    if name == "disk":
        return disk.DiskSource(folder / "versions"), disk.DiskTarget()
    return ipc.IpcSource(folder), ipc.IpcTarget()


def _engine(name: str, folder: Path, token: bytes, layout: Layout, pipe: Connection) -> None:
    """The other process: receives until it is told to stop, and says how long each pause was."""
    engine = _Idle()
    receiver = WeightReceiver(folder / "s", token, layout, 0, _ends(name, folder)[1], engine)
    receiver.start()
    while pipe.recv():
        pipe.send(engine.paused_s)
    receiver.close()


def measure(name: str, sides: tuple[Layout, Layout], repeats: int) -> Speed:
    """Transfer random bytes over and over, each time others."""
    with tempfile.TemporaryDirectory() as path:
        folder, token = Path(path), secrets.token_bytes(32)
        source = WeightSource(folder / "s", token, sides[0], 0, _ends(name, folder)[0])
        sizes = sides[0].ranks[0].buffers
        source.buffers = {n: torch.randint(0, 256, (size,), dtype=torch.uint8) for n, size in sizes.items()}
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        child = context.Process(target=_engine, args=(name, folder, token, sides[1], theirs), daemon=True)
        child.start()
        with WeightSender(folder / "s", token, sources=1, receivers=1) as sender:
            source.start()
            sender.wait(60)
            rows = []
            for repeat in range(_WARM_UP + repeats):
                began = time.perf_counter()
                outcome = sender.sync(str(repeat))
                if not outcome.committed:
                    raise RuntimeError(f"{name}: {outcome.cause}")
                total = time.perf_counter() - began
                ours.send(True)
                rows.append((outcome.seconds[Phase.TRANSFER], outcome.seconds[Phase.VERIFY], total, ours.recv()))
                _update(source, share=name != COPYING)
            ours.send(False)
            child.join(10)
        source.close()
    medians = [statistics.median(column) for column in zip(*rows[_WARM_UP:], strict=True)]
    return Speed(outcome.bytes, outcome.copied_bytes, *medians)


def _update(source: WeightSource, *, share: bool) -> None:
    """The next version, as an optimizer would write it: to memory that the transport has for it, if it has any."""
    old = source.buffers
    new = (source.renew() if share else None) or old
    for name, buffer in old.items():
        torch.add(buffer, 1, out=new[name])


def wire_forms(name: str, repeats: int, copy_gb_per_s: float) -> None:
    """Print how long each wire form of one model takes to make and to move."""
    sides = megatron_layout(_WIRE_MODEL, MegatronSizes()), sglang_layout(_WIRE_MODEL, SglangSizes())
    weights = {n: torch.randn(size // 2).bfloat16().view(torch.uint8) for n, size in sides[0].ranks[0].buffers.items()}
    print(f"\nwire forms by {name}\n{HEADER}  quantise s")
    print(measure(name, sides, repeats).row("bf16", copy_gb_per_s), flush=True)
    for form in (FORMS["fp8_block"], FORMS["mxfp8"], FORMS["int4_group128"]):
        began = time.perf_counter()
        quantise(sides[0], 0, weights, form)
        seconds = time.perf_counter() - began
        quantised = sending_layout(sides[0], form), receiving_layout(sides[1], form)
        print(f"{measure(name, quantised, repeats).row(form.name, copy_gb_per_s)}  {seconds:10.3f}", flush=True)


def memory_speed(nbytes: int) -> tuple[float, float]:
    """GB/s of copying warm memory of this size, and of digesting it, on all cores."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    step = 4 << 20
    ends = [(start, min(start + step, nbytes)) for start in range(0, nbytes, step)]
    parts = [Copy("", "", 0, 0, "x", start, end - start, 1, end - start) for start, end in ends]
    copying = _median(lambda: target.copy_(source))
    digesting = _median(lambda: target_digests({"x": target}, [Batch(0, 0, tuple(parts))], {}))
    return nbytes / copying / 1e9, nbytes / digesting / 1e9


def _median(action: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--transports", nargs="+", default=["ipc", COPYING, "rdma", "collective", "disk"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--wire-forms", action="store_true", help="measure the quantised forms, too")
    options = parser.parse_args()
    model = read_shape(options.model)
    copying, digesting = memory_speed(sum(t.nbytes for t in model.tensors().values()))
    print(f"{options.model}: a copy of its size {copying:.2f} GB/s, its digest {digesting:.2f} GB/s\n{HEADER}")
    sides = megatron_layout(model, MegatronSizes()), sglang_layout(model, SglangSizes())
    for name in options.transports:
        print(measure(name, sides, options.repeats).row(name, copying), flush=True)
    if options.wire_forms:
        wire_forms(options.transports[0], options.repeats, copying)


if __name__ == "__main__":
    main()
