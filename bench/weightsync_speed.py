"""Weight transfer between two processes, per transport: ``python -m zerokl.bench.weightsync_speed``.

The trainer's layout is Megatron's, the engine's SGLang's, so the fused query-key-value weights really are rearranged.
"""

from __future__ import annotations

import argparse
import multiprocessing
import secrets
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.model_shape import ModelShape, read_shape
from zerokl.weightsync.protocol import Phase
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, disk, ipc, rdma
from zerokl.weightsync.transports.base import Buffers, Source, Target


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


def _ends(name: str, folder: Path) -> tuple[Source, Target]:
    if name == "rdma":
        return rdma.RdmaSource(), rdma.RdmaTarget()
    if name == "collective":
        return collective.CollectiveSource(folder, ranks=(1, 1)), collective.CollectiveTarget(folder, ranks=(1, 1))
    if name == "disk":
        return disk.DiskSource(folder / "versions"), disk.DiskTarget()
    return ipc.IpcSource(folder), ipc.IpcTarget()


def _engine(name: str, folder: Path, token: bytes, model: ModelShape, pipe: Connection) -> None:
    """The other process: receives until it is told to stop, and says how long each pause was."""
    engine = _Idle()
    layout = sglang_layout(model, SglangSizes())
    receiver = WeightReceiver(folder / "s", token, layout, 0, _ends(name, folder)[1], engine)
    receiver.start()
    while pipe.recv():
        pipe.send(engine.paused_s)
    receiver.close()


def measure(name: str, model: ModelShape, repeats: int) -> str:
    """One line of the table: medians over ``repeats`` transfers after one that warms up."""
    with tempfile.TemporaryDirectory() as path:
        folder, token = Path(path), secrets.token_bytes(32)
        layout = megatron_layout(model, MegatronSizes())
        source = WeightSource(folder / "s", token, layout, 0, _ends(name, folder)[0])
        sizes = layout.ranks[0].buffers
        source.buffers = {n: torch.randint(0, 256, (size,), dtype=torch.uint8) for n, size in sizes.items()}
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        child = context.Process(target=_engine, args=(name, folder, token, model, theirs), daemon=True)
        child.start()
        with WeightSender(folder / "s", token, sources=1, receivers=1) as sender:
            source.start()
            sender.wait(60)
            rows = []
            for repeat in range(repeats + 1):
                began = time.perf_counter()
                outcome = sender.sync(str(repeat))
                if not outcome.committed:
                    raise RuntimeError(f"{name}: {outcome.cause}")
                total = time.perf_counter() - began
                ours.send(True)
                rows.append((total, outcome.seconds[Phase.TRANSFER], outcome.seconds[Phase.VERIFY], ours.recv()))
                for buffer in source.buffers.values():
                    buffer.add_(1)
            ours.send(False)
            child.join(10)
        source.close()
    total, transfer, verify, pause = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return (
        f"{name:>10}  {outcome.bytes / 1e6:8.1f}  {transfer:8.3f}  {outcome.bytes / transfer / 1e9:6.2f}  {verify:8.3f}"
        f"  {total:8.3f}  {pause * 1e3:9.1f}  {outcome.copied_bytes / outcome.bytes:6.2f}"
    )


def copy_speed(nbytes: int) -> float:
    """GB/s of copying warm memory of this size."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return nbytes / statistics.median(times) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--transports", nargs="+", default=["ipc", "rdma", "collective", "disk"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = read_shape(options.model)
    print(
        f"{options.model}: {copy_speed(sum(t.nbytes for t in model.tensors().values())):.2f} GB/s by a copy of its size"
    )
    print(
        f"{'transport':>10}  {'MB':>8}  {'move s':>8}  {'GB/s':>6}  {'verify s':>8}  {'total s':>8}  {'pause ms':>9}"
        "  copies"
    )
    for name in options.transports:
        print(measure(name, model, options.repeats), flush=True)


if __name__ == "__main__":
    main()
