"""The other end of `protocol`: what a sending or receiving rank does with each order, without I/O.

The owner performs the returned effect and reports `done` or `failed`. A receiver may serve requests whenever `serving`
is true, with `version`, and at no other time.
"""

from __future__ import annotations

import enum

from zerokl.weightsync import messages as m


class State(enum.StrEnum):
    IDLE = "idle"
    PLANNED = "planned"
    PREPARED = "prepared"
    TRANSFERRED = "transferred"
    VERIFIED = "verified"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"


class Effect(enum.StrEnum):
    NONE = "nothing"
    REFUSE = "refuse"
    PLAN = "plan"
    PREPARE = "prepare"
    TRANSFER = "transfer"
    VERIFY = "verify"
    COMMIT = "commit"
    RESUME = "resume"
    ROLL_BACK = "roll back"


_STEPS: dict[type[m.Message], tuple[Effect, State, State]] = {
    m.Prepare: (Effect.PREPARE, State.PLANNED, State.PREPARED),
    m.Transfer: (Effect.TRANSFER, State.PREPARED, State.TRANSFERRED),
    m.Verify: (Effect.VERIFY, State.TRANSFERRED, State.VERIFIED),
    m.Commit: (Effect.COMMIT, State.VERIFIED, State.COMMITTED),
}
"""Order -> (effect, state it needs, state after it)."""


class Participant:
    """``source``: a sender has no version of its own and resumes right after its transfer. ``in_place``: a receiver
    without a shadow buffer; it stops serving before the transfer, and a failure after that quarantines it."""

    def __init__(self, *, source: bool, in_place: bool = False) -> None:
        self._source, self._in_place = source, in_place
        self.state = State.IDLE
        self.version: str | None = None
        self.attempt = b""
        self._next: tuple[Effect, State] = (Effect.NONE, State.IDLE)
        self._new_version = ""
        self._touched = False

    @property
    def serving(self) -> bool:
        """Whether requests may be answered now. Paused from the acknowledgement to RESUME: it is not known then
        which version the others serve."""
        stopped = {State.VERIFIED, State.COMMITTED, State.QUARANTINED}
        if self._in_place:
            stopped |= {State.PREPARED, State.TRANSFERRED}
        return self.version is not None and not self._touched and self.state not in stopped

    @property
    def waiting(self) -> bool:
        """Whether a silent coordinator counts as gone. Not after COMMIT: it may have decided either way."""
        return self.state not in (State.IDLE, State.QUARANTINED, State.COMMITTED)

    @property
    def resuming(self) -> bool:
        """Whether RESUME has come: all have the new version, so the coordinator is needed no more."""
        return self.state in (State.COMMITTED, State.TRANSFERRED) and self._next[0] is Effect.RESUME

    def receive(self, order: m.Message) -> Effect:
        """What to do about an order. REFUSE: answer `refusal` and change nothing."""
        if isinstance(order, m.Plan) and self.state in (State.IDLE, State.QUARANTINED):
            self.attempt, self._new_version = order.attempt, order.version
            return self._expect(Effect.PLAN, State.PLANNED)
        if isinstance(order, m.Abort):  # never refused: of an attempt this one is not in, there is nothing to undo
            return Effect.ROLL_BACK if order.attempt == self.attempt else Effect.NONE
        if getattr(order, "attempt", None) != self.attempt:
            return Effect.REFUSE
        if isinstance(order, m.Resume) and self.state is (State.TRANSFERRED if self._source else State.COMMITTED):
            return self._expect(Effect.RESUME, State.IDLE)
        effect, needed, after = _STEPS.get(type(order), (Effect.REFUSE, State.IDLE, State.IDLE))
        if self.state is not needed or (self._source and effect in (Effect.VERIFY, Effect.COMMIT)):
            return Effect.REFUSE
        if effect is Effect.TRANSFER and self._in_place:
            self._touched = True
        return self._expect(effect, after)

    def refusal(self, order: m.Message) -> str:
        """The cause to answer to a refused order."""
        return f"{type(order).__name__} does not fit: state {self.state} of version {self._new_version!r}"

    def done(self) -> None:
        """The effect succeeded."""
        effect, self.state = self._next
        if effect is Effect.RESUME:
            self.version, self._touched, self.attempt = self._new_version, False, b""

    def rolled_back(self) -> bool:
        """ROLL_BACK succeeded, or the attempt failed here. Returns whether this participant is now quarantined."""
        if self._touched or self.state is State.QUARANTINED:
            self.quarantine()
        else:
            self.state = State.IDLE
        return self.state is State.QUARANTINED

    def quarantine(self) -> None:
        """What is held cannot be trusted: serve nothing until the next complete transfer."""
        self.state, self.version = State.QUARANTINED, None

    def _expect(self, effect: Effect, after: State) -> Effect:
        self._next = effect, after
        return effect
