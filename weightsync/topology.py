"""Which transport fits where the participants are: a pure function of what each of them says of itself.

    memory of one host                          ipc
    GPUs that can open each other's memory      cuda_ipc
    several hosts, NIXL and a network card      rdma
    everything else of one kind of memory       collective (gloo, or NCCL on GPUs)
    host memory on one side, a GPU's on the other  rdma

`disk` and `mooncake` are never chosen, only asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Typed

AUTO = "auto"
TRANSPORTS = ("ipc", "disk", "rdma", "collective", "cuda_ipc", "mooncake")
HOST_MEMORY = "cpu"

Name = Annotated[str, Meta(max_length=64)]


class Place(Typed, frozen=True):
    """Where a participant is. ``host``: one boot of one kernel, and one view of its files; ``memory``: of its weights,
    `HOST_MEMORY` or the GPU's UUID; ``reaches``: the GPUs whose memory it can open, its own too; ``card``: an
    RDMA-capable network card is up; ``transports``: those it has what they need for."""

    host: Name
    memory: Name = HOST_MEMORY
    reaches: tuple[Name, ...] = ()
    card: bool = False
    transports: tuple[Name, ...] = TRANSPORTS


@dataclass(frozen=True)
class Choice:
    """A transport and why it was taken."""

    transport: str
    reason: str


class Unfit(WeightSyncError):
    """A transport that cannot work between these participants: the cause, and what to do about it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}: {remedy}")
        self.cause, self.remedy = cause, remedy


_REMEDY = 'set transport to "auto" or "{}"'


@dataclass(frozen=True)
class _Limits:
    """What a transport works between. ``memory``: "host", "gpus" that reach each other, "alike" (all of one kind, and
    no GPU twice: NCCL takes each once), or "any"."""

    needs: str
    one_host: bool
    memory: str


_LIMITS = {
    "ipc": _Limits("Linux", one_host=True, memory="host"),
    "disk": _Limits("a folder that both sides see", one_host=False, memory="host"),
    "rdma": _Limits("NIXL: pip install nixl-cu12, or nixl-cu13 beside CUDA 13", one_host=False, memory="any"),
    "collective": _Limits("torch.distributed", one_host=False, memory="alike"),
    "cuda_ipc": _Limits("a GPU that torch sees", one_host=True, memory="gpus"),
    "mooncake": _Limits(
        "pip install mooncake-transfer-engine-non-cuda, and the system's libibverbs and libnl-3",
        one_host=True, memory="host",
    ),
}  # fmt: skip


def choose(wanted: str, sources: Sequence[Place], targets: Sequence[Place]) -> Choice:
    """The transport for these senders and receivers; ``wanted``: one of `TRANSPORTS`, or `AUTO`.

    Raises Unfit for one that cannot work between them, and where none can.
    """
    everyone = [*sources, *targets]
    if wanted != AUTO:
        if problem := _problem(wanted, sources, targets):
            raise problem
        return Choice(wanted, "asked for by name")
    if len({place.transports for place in everyone}) == 1 == len(everyone[0].transports):
        return Choice(everyone[0].transports[0], "the only one that the participants have")
    apart, cards = len({place.host for place in everyone}) > 1, all(place.card for place in everyone)
    where = "several hosts" if apart else "one host"
    preferred = [
        ("ipc", "host memory of one host", True),
        ("cuda_ipc", "GPUs of one host that can open each other's memory", True),
        ("rdma", "several hosts, each with NIXL and an RDMA card", apart and cards),
        ("collective", f"{where}, and no faster way between all of them", True),
        ("rdma", f"{where}, and memory of different kinds", True),
    ]
    for name, reason, sensible in preferred:
        if sensible and _problem(name, sources, targets) is None:
            return Choice(name, reason)
    causes = [str(_problem(name, sources, targets)) for name in ("ipc", "cuda_ipc", "collective", "rdma")]
    raise Unfit("no transport works between all participants", "; ".join(causes))


def lacking(name: str) -> Unfit:
    """The error for a transport that a participant does not have what it needs for."""
    return Unfit(f"{name}: not every participant has what it needs", f"it needs {_LIMITS[name].needs}")


def _problem(name: str, sources: Sequence[Place], targets: Sequence[Place]) -> Unfit | None:
    """Why a transport cannot work between these; None if it can."""
    everyone = [*sources, *targets]
    if name not in _LIMITS:
        return Unfit(f"transport {name!r} is not known", f"known are {', '.join((AUTO, *TRANSPORTS))}")
    if any(name not in place.transports for place in everyone):
        return lacking(name)
    if _LIMITS[name].one_host and len({place.host for place in everyone}) > 1:
        return Unfit(f"{name} works within one host, the participants are on several", _REMEDY.format("rdma"))
    return _memory_problem(name, sources, targets)


def _memory_problem(name: str, sources: Sequence[Place], targets: Sequence[Place]) -> Unfit | None:
    memories = [place.memory for place in (*sources, *targets)]
    on_host = memories.count(HOST_MEMORY)
    match _LIMITS[name].memory:
        case "host" if on_host < len(memories):
            return Unfit(f"{name} moves host memory, and there are weights on a GPU", _REMEDY.format("cuda_ipc"))
        case "alike" if 0 < on_host < len(memories):
            return Unfit(f"{name} moves memory of one kind, and there is host and GPU memory", _REMEDY.format("rdma"))
        case "alike" if not on_host and len(set(memories)) < len(memories):
            return Unfit(f"{name} takes each GPU once, and two participants share one", _REMEDY.format("cuda_ipc"))
        case "gpus" if on_host:
            return Unfit(f"{name} moves memory of GPUs, and there are weights in host memory", _REMEDY.format("ipc"))
        case "gpus" if not all(source.memory in target.reaches for source in sources for target in targets):
            return Unfit(f"a receiver's GPU cannot open the memory of a sender's, as {name} does",
                         _REMEDY.format("collective"))  # fmt: skip
    return None
