"""The coordinator of a weight transfer: a state machine without I/O.

    PLAN -> PREPARE -> TRANSFER -> VERIFY -> COMMIT -> RESUME

Each phase sends an order and waits for an answer from everyone concerned. Any failure, foreign answer, lost connection
or passed deadline before the decision to RESUME turns into ABORT: all go back to the version before, and the cause is
kept. RESUME is decided only after every receiver has the new version in place and the old one at hand, so at no time
do two of them serve different versions. Who fails after that decision is named as lost: it holds nothing it may serve.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import xxhash

from zerokl.weightsync import messages as m
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Layout
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.plan import Plan, make_plan

Outgoing = list[tuple[str, m.Message]]


class Phase(enum.StrEnum):
    IDLE = "idle"
    PLAN = "plan"
    PREPARE = "prepare"
    TRANSFER = "transfer"
    VERIFY = "verify"
    COMMIT = "commit"
    RESUME = "resume"
    ABORT = "abort"


@dataclass(frozen=True)
class Deadlines:
    """Seconds each phase may take."""

    plan: float = 30.0
    prepare: float = 60.0
    transfer: float = 300.0
    verify: float = 60.0
    commit: float = 30.0
    resume: float = 30.0
    abort: float = 10.0

    @property
    def patience(self) -> float:
        """How long a participant waits for its next order: no phase takes longer, and an abort may follow it."""
        return max(self.plan, self.prepare, self.transfer, self.verify, self.commit) + self.abort


@dataclass
class Outcome:
    """How an attempt ended. ``lost``: participants that did not confirm the end, with the reason; ``quarantined``:
    those that confirmed it but must not serve before the next complete transfer."""

    version: str
    committed: bool = False
    cause: str = ""
    failed_in: Phase = Phase.IDLE
    lost: dict[str, str] = field(default_factory=dict)
    quarantined: set[str] = field(default_factory=set)
    bytes: int = 0
    copied: dict[str, int] = field(default_factory=dict)
    """Bytes that each participant copied, by name."""
    seconds: dict[str, float] = field(default_factory=dict)
    paused_s: float = 0.0
    """The longest time an engine did not serve, from its order to stop to its first chance to serve again."""

    @property
    def copied_bytes(self) -> int:
        return sum(self.copied.values())

    @property
    def copied_by_engines(self) -> int:
        return sum(size for name, size in self.copied.items() if name.startswith("rollout"))

    @property
    def gb_per_s(self) -> float:
        return self.bytes / max(self.seconds.get(Phase.TRANSFER, 0.0), 1e-9) / 1e9


_ANSWERS: dict[Phase, type[m.Message]] = {
    Phase.PLAN: m.Planned,
    Phase.PREPARE: m.Prepared,
    Phase.TRANSFER: m.Transferred,
    Phase.VERIFY: m.Verified,
    Phase.COMMIT: m.Committed,
    Phase.RESUME: m.Resumed,
    Phase.ABORT: m.Aborted,
}


class Coordinator:
    """Drives one attempt at a time. ``deadline``: when to call `tick`; ``waiting``: for whom it waits."""

    def __init__(
        self, sender: Layout, receiver: Layout, deadlines: Deadlines, *, floor_gb_per_s: float = 0.0,
        transport: str = "",
    ) -> None:  # fmt: skip
        """Plan the transfer; ``transport``: what everyone is told to use. Raises LayoutError if the sides do not fit
        together."""
        self.plan: Plan = make_plan(sender, receiver)
        self._layouts = sender, receiver
        self.deadlines, self._floor, self._transport = deadlines, floor_gb_per_s, transport
        self.sources = [name_of(source=True, rank=rank) for rank in range(len(sender.ranks))]
        self.targets = [name_of(source=False, rank=rank) for rank in range(len(receiver.ranks))]
        self.phase = Phase.IDLE
        self.waiting: set[str] = set()
        self.deadline = float("inf")
        self.outcome = Outcome("")
        self.attempt = b""

    def check_idle(self, version: str) -> None:
        """Raise WeightSyncError if a transfer is under way that one of ``version`` would disturb."""
        if self.phase is not Phase.IDLE:
            raise WeightSyncError(
                f"cannot start a transfer of {version!r}: that of {self.outcome.version!r} is in {self.phase}"
            )

    def begin(self, attempt: bytes, version: str, now: float, in_flight: m.InFlight = "abort") -> Outgoing:
        """Start an attempt. Raises WeightSyncError while another one is under way."""
        self.check_idle(version)
        self.attempt, self.outcome = attempt, Outcome(version, bytes=self.plan.nbytes)
        self._answers: dict[str, m.Message] = {}
        self._expected: dict[str, tuple[bytes, ...]] = {}
        sender, receiver = self._layouts
        order = m.Plan(attempt, version, sender, receiver, self.deadlines.patience, self._transport, in_flight)
        return self._enter(Phase.PLAN, self.sources + self.targets, lambda _: order, now)

    def receive(self, peer: str, message: m.Message, now: float) -> Outgoing:
        """Take in an answer; what to send next."""
        if self.phase is Phase.IDLE or getattr(message, "attempt", None) != self.attempt:
            return []  # the late answer of an attempt that is over
        if self.phase is Phase.ABORT and not isinstance(message, m.Aborted):
            if isinstance(message, m.Failed):  # who fails because of another may have been heard before it
                self.outcome.cause += f"; {peer}: {message.cause}"
            return []  # it crossed the order to abort, which is answered too
        if isinstance(message, m.Failed):
            return self._fail(peer, f"{peer}: {message.cause}", now)
        if not isinstance(message, _ANSWERS[self.phase]) or peer not in self.waiting:
            return self._fail(peer, f"{peer} answered {type(message).__name__} in {self.phase}", now)
        cause = self._check(peer, message)
        if cause:
            return self._fail(peer, cause, now)
        self._answers[peer] = message
        self.waiting.discard(peer)
        return self._advance(now)

    def lost(self, peer: str, cause: str, now: float) -> Outgoing:
        """The connection to a participant ended."""
        return self._fail(peer, f"{peer}: {cause}", now) if self.phase is not Phase.IDLE else []

    def tick(self, now: float) -> Outgoing:
        """Act on a passed deadline."""
        if now < self.deadline:
            return []
        late = ", ".join(sorted(self.waiting))
        cause = f"waited {self._limit(self.phase):g} s in {self.phase} for {late}"
        if self.phase not in (Phase.RESUME, Phase.ABORT):
            return self._abort(cause, now)
        for peer in self.waiting:
            self.outcome.lost[peer] = cause
        self.waiting.clear()
        return self._advance(now)

    def fail(self, cause: str, now: float) -> Outgoing:
        """Abort for a reason of the caller's own."""
        return self._abort(cause, now)

    def _fail(self, peer: str, cause: str, now: float) -> Outgoing:
        if self.phase not in (Phase.RESUME, Phase.ABORT):
            return self._abort(cause, now)
        self.outcome.lost.setdefault(peer, cause.removeprefix(f"{peer}: "))
        self.waiting.discard(peer)
        return self._advance(now)

    def _abort(self, cause: str, now: float) -> Outgoing:
        if self.phase in (Phase.IDLE, Phase.RESUME, Phase.ABORT):
            return []
        self.outcome.cause, self.outcome.failed_in = cause, self.phase
        order = m.Abort(self.attempt, m.shortened(cause))
        return self._enter(Phase.ABORT, self.sources + self.targets, lambda _: order, now)

    def _check(self, peer: str, message: m.Message) -> str:
        """Why an answer of the right type is still wrong; empty if it is not."""
        match message:
            case m.Planned(_, digest) if digest != self.plan.digest:
                return f"{peer} computed plan {digest}, the coordinator {self.plan.digest}"
            case m.Transferred(_, digests):
                count = sum(len(b.copies) for b in self.plan.batches if name_of(source=True, rank=b.source) == peer)
                if len(digests) != (count if peer in self.sources else 0):
                    return f"{peer} sent {len(digests)} digests of {count} copies"
            case m.Verified(_, digest) if digest != xxhash.xxh3_128_digest(b"".join(self._expected[peer])):
                return f"{peer} acknowledged other bytes than were sent"
            case m.Resumed(_, paused_s):
                self.outcome.paused_s = max(self.outcome.paused_s, paused_s)
            case m.Aborted(_, quarantined) if quarantined:
                self.outcome.quarantined.add(peer)
        return ""

    def _advance(self, now: float) -> Outgoing:
        if self.waiting:
            return []
        attempt, everyone = self.attempt, self.sources + self.targets
        self.outcome.seconds[self.phase] = now - self._entered
        if self.phase in (Phase.RESUME, Phase.ABORT):
            self.outcome.committed = self.phase is Phase.RESUME
            self.phase, self.deadline = Phase.IDLE, float("inf")
            return []
        if self.phase is Phase.TRANSFER:
            return self._transferred(now)
        endpoints = {peer: a.endpoint for peer, a in self._answers.items() if isinstance(a, m.Prepared)}
        following: dict[Phase, tuple[Phase, list[str], m.Message]] = {
            Phase.PLAN: (Phase.PREPARE, everyone, m.Prepare(attempt)),
            Phase.PREPARE: (Phase.TRANSFER, everyone, m.Transfer(attempt, endpoints)),
            Phase.VERIFY: (Phase.COMMIT, self.targets, m.Commit(attempt)),
            Phase.COMMIT: (Phase.RESUME, everyone, m.Resume(attempt)),
        }
        phase, peers, order = following[self.phase]
        return self._enter(phase, peers, lambda _: order, now)

    def _transferred(self, now: float) -> Outgoing:
        """All bytes have moved: hand each target the digests its senders computed."""
        answers = {peer: a for peer, a in self._answers.items() if isinstance(a, m.Transferred)}
        self.outcome.copied = {peer: answer.copied_bytes for peer, answer in answers.items()}
        if self.outcome.gb_per_s < self._floor:
            return self._abort(
                f"the transport moved {self.outcome.bytes / 1e6:.1f} MB at {self.outcome.gb_per_s:.3g} GB/s, "
                f"the floor is {self._floor:g}",
                now,
            )
        self._expected = expected_digests(self.plan, {peer: answer.digests for peer, answer in answers.items()})
        return self._enter(Phase.VERIFY, self.targets, lambda peer: m.Verify(self.attempt, self._expected[peer]), now)

    def _enter(self, phase: Phase, peers: Iterable[str], order: Callable[[str], m.Message], now: float) -> Outgoing:
        self.phase, self.waiting, self._entered = phase, set(peers), now
        self.deadline = now + self._limit(phase)
        self._answers = {}
        return [(peer, order(peer)) for peer in peers]

    def _limit(self, phase: Phase) -> float:
        return getattr(self.deadlines, phase.value)


def expected_digests(plan: Plan, sent: Mapping[str, tuple[bytes, ...]]) -> dict[str, tuple[bytes, ...]]:
    """Digests by target, in the plan's order, from digests by source, in the plan's order."""
    left = {peer: iter(digests) for peer, digests in sent.items()}
    found: dict[str, list[bytes]] = {peer: [] for peer in sent if peer.startswith("rollout")}
    for batch in plan.batches:
        source, target = name_of(source=True, rank=batch.source), name_of(source=False, rank=batch.target)
        found[target] += [next(left[source]) for _ in batch.copies]
    return {peer: tuple(digests) for peer, digests in found.items()}
