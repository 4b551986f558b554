"""Weight transfers of a run: where their participants meet, and the trainer's side of them.

meeting = Meeting.in_folder(scratch)                 # once, before anything starts
EngineConfig(..., transfer=meeting.transfer())       # each engine joins by itself
with WeightLink(meeting, *block_layout(*policy.weight_blocks())) as link:
    report = link.sync("7", timeout_s=60)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.ends import Ends, Site, source_ends
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Layout
from zerokl.weightsync.members import WeightSource
from zerokl.weightsync.messages import InFlight
from zerokl.weightsync.protocol import Deadlines, Outcome
from zerokl.weightsync.topology import AUTO
from zerokl.weightsync.transports.base import Buffers, Source
from zerokl.weightsync.wire import new_token, read_token

if TYPE_CHECKING:
    import torch

    from zerokl.alignment.sglang.config import Transfer


@dataclass(frozen=True)
class Meeting:
    """A folder of this user alone with the coordinator's address and the run's token. ``transport``: a name or "auto";
    ``senders``: trainer ranks; ``receivers``: ranks of all engines; ``floor_gb_per_s``: a slower transfer is refused.

    ``host``: the IP address of the coordinator's host, if participants are on several, which all see the folder; empty:
    they are on one. ``interface``: the network device by which this participant reaches the others."""

    folder: Path
    transport: str = AUTO
    receivers: int = 1
    senders: int = 1
    floor_gb_per_s: float = 0.0
    host: str = ""
    interface: str = "lo"

    @staticmethod
    def in_folder(
        parent: Path, *, transport: str = AUTO, receivers: int = 1, senders: int = 1, floor_gb_per_s: float = 0.0,
        host: str = "",
    ) -> Meeting:  # fmt: skip
        """A new folder below ``parent``, whose path must be short if all are on one host: sockets lie in it."""
        folder = parent / "weights"
        folder.mkdir(mode=0o700)
        new_token(folder / "token")
        return Meeting(folder, transport, receivers, senders, floor_gb_per_s, host)

    @property
    def address(self) -> Path:
        return self.folder / "s"

    @property
    def token(self) -> bytes:
        return read_token(self.folder / "token")

    @property
    def ranks(self) -> tuple[int, int]:
        """How many send and how many receive."""
        return self.senders, self.receivers

    def on(self, interface: str) -> Meeting:
        """The same, for a participant that reaches the others by this network device."""
        return replace(self, interface=interface)

    def site(self, device: torch.device) -> Site:
        """What a participant's ends are built with, if its weights are on ``device``."""
        return Site(self.folder, self.ranks, device, self.interface, one_host=not self.host)

    def transfer(self, engine: int = 0) -> Transfer:
        """What engine number ``engine`` is started with."""
        from zerokl.alignment.sglang.config import Transfer

        token = str(self.folder / "token")
        return Transfer(str(self.address), token, engine=engine, ranks=self.ranks, interface=self.interface)


@dataclass(frozen=True)
class SyncReport:
    """One completed transfer. ``reason``: why this transport; ``copied_bytes``: copied by all participants together,
    ``copied_by_engines``: by the engines alone; ``gb_per_s``: of the bytes' way; ``paused_s``: how long the engine did
    not serve."""

    version: str
    transport: str
    reason: str
    bytes: int
    copied_bytes: int
    copied_by_engines: int
    gb_per_s: float
    paused_s: float

    def __str__(self) -> str:
        return (
            f"weights: {self.bytes / 1e6:.1f} MB by {self.transport} ({self.reason}) at {self.gb_per_s:.2f} GB/s, "
            f"copied {self.copied_bytes / self.bytes:.2f} times in all, {self.copied_by_engines} bytes by the engine"
        )


def sending_rank(
    meeting: Meeting, layout: Layout, buffers: Buffers, rank: int, *, source: Source | None = None
) -> WeightSource:  # fmt: skip
    """Rank number ``rank`` of the trainer, whose own layout and memory these are, ready to send in the background.
    ``source``: the one end to use."""
    device = next(iter(buffers.values())).device
    ends = Ends.only(source) if source else source_ends(meeting.site(device))
    of_all = Layout(layout.tensors, layout.ranks * (rank + 1))
    sending = WeightSource(meeting.address, meeting.token, of_all, rank, ends)
    sending.buffers = buffers
    sending.start()
    return sending


class WeightLink:
    """The trainer's side: the coordinator, and the first sending rank."""

    def __init__(
        self, meeting: Meeting, layout: Layout, buffers: Buffers, *, source: Source | None = None
    ) -> None:  # fmt: skip
        """``buffers``: the memory of the weights, read at every transfer. ``source``: the one end to use (for fault
        injection)."""
        self.watch: Callable[[str], None] = lambda _: None  # told every phase of a transfer as it begins
        self.sender = WeightSender(
            meeting.address, meeting.token, sources=meeting.senders, receivers=meeting.receivers,
            transport=meeting.transport, floor_gb_per_s=meeting.floor_gb_per_s, host=meeting.host,
            observe=self._entered,
        )  # fmt: skip
        self.source = sending_rank(meeting, layout, buffers, 0, source=source)

    def sync(self, version: str, *, timeout_s: float, in_flight: InFlight = "abort") -> SyncReport:
        """Give the engine the weights as they are now. Raises WeightSyncError, with the cause, if it did not come to
        that: the engine serves what it served before, or nothing. Unfit, one of these, for a transport that cannot work
        here; TimeoutError if someone did not join in time."""
        outcome = self.attempt(version, timeout_s=timeout_s, in_flight=in_flight)
        if not outcome.committed or outcome.lost:
            cause = outcome.cause or "; ".join(f"{name}: {why}" for name, why in outcome.lost.items())
            raise WeightSyncError(f"weights {version!r} did not reach the engine: {cause}")
        return self.report(outcome)

    def attempt(
        self, version: str, *, timeout_s: float, in_flight: InFlight = "abort", deadlines: Deadlines | None = None
    ) -> Outcome:
        """The same for who wants to know how it failed."""
        self.sender.wait(timeout_s)
        return self.sender.sync(version, in_flight=in_flight, deadlines=deadlines)

    def report(self, outcome: Outcome) -> SyncReport:
        """A transfer that was committed."""
        choice = self.sender.choice
        assert choice is not None
        return SyncReport(
            outcome.version, choice.transport, choice.reason, outcome.bytes, outcome.copied_bytes,
            outcome.copied_by_engines, outcome.gb_per_s, outcome.paused_s,
        )  # fmt: skip

    def _entered(self, phase: str) -> None:
        self.watch(phase)

    def close(self) -> None:
        """Leave; engines keep what they serve."""
        self.sender.close()
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
