"""The state machines alone, driven through every interleaving that hypothesis can think of."""

import secrets

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zerokl.weightsync import messages as m
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Box, Layout, Piece, Rank, Tensor
from zerokl.weightsync.participant import Effect, Participant, State
from zerokl.weightsync.protocol import Coordinator, Deadlines, Phase

SOURCES, TARGETS = ["trainer-0"], ["rollout-0", "rollout-1", "rollout-2"]


def layout(ranks: int) -> Layout:
    rank = Rank({"b": 64}, (Piece("w", Box(0, 4, 0, 8), "b", 0, 16),))
    return Layout((Tensor("w", (4, 8), "bfloat16"),), (rank,) * ranks)


def coordinator(**options) -> Coordinator:
    return Coordinator(layout(1), layout(3), Deadlines(), **options)


DIGEST = bytes(range(16))


def answer(order: m.Message, plan_digest: str, source: bool) -> m.Message:
    """What a participant in good order answers."""
    attempt = order.attempt  # type: ignore[attr-defined]
    match order:
        case m.Plan():
            return m.Planned(attempt, plan_digest)
        case m.Prepare():
            return m.Prepared(attempt, b"here")
        case m.Transfer():
            return m.Transferred(attempt, (DIGEST,) * 3 if source else (), 64, 0.1)
        case m.Verify(_, digests):
            return m.Verified(attempt, xxhash.xxh3_128_digest(b"".join(digests)))
        case m.Commit():
            return m.Committed(attempt)
        case m.Resume():
            return m.Resumed(attempt)
    raise AssertionError(order)


class Faults(RuleBasedStateMachine):
    """One coordinator and four participants; messages arrive in order on each connection, everything else may happen.

    Beyond crashes this includes participants that stop (their messages wait) and give up on the coordinator.
    """

    def __init__(self):
        super().__init__()
        self.now, self.number = 0.0, 0
        self.coordinator = coordinator()
        self.members = {name: Participant(source=name in SOURCES) for name in SOURCES + TARGETS}
        self.orders = {name: [] for name in self.members}
        self.answers = {name: [] for name in self.members}
        self.held = dict.fromkeys(TARGETS)  # the version whose bytes the engine holds
        self.verified: set[str] = set()
        self.decided: list[str] = []

    def deliver(self, outgoing):
        for name, message in outgoing:
            if isinstance(message, m.Resume) and self.decided[-1:] != [self.coordinator.outcome.version]:
                self.decided.append(self.coordinator.outcome.version)
            self.orders[name].append(message)

    @precondition(lambda self: self.coordinator.phase is Phase.IDLE)
    @rule()
    def begin(self):
        self.number += 1
        self.deliver(self.coordinator.begin(secrets.token_bytes(16), f"v{self.number}", self.now))

    @rule(name=st.sampled_from(SOURCES + TARGETS), fails=st.sampled_from([False] * 9 + [True]))
    def take_an_order(self, name, fails):
        if self.orders[name]:
            self.obey(name, fails)
            self.only_one_version_is_served_and_it_was_verified_and_decided()

    def obey(self, name, fails):
        order, member = self.orders[name].pop(0), self.members[name]
        if isinstance(order, m.Abort):
            if member.receive(order) is Effect.ROLL_BACK:
                self.roll_back(name)
            self.answers[name].append(m.Aborted(order.attempt, member.state is not State.IDLE))
            return
        effect = member.receive(order)
        if effect is Effect.REFUSE or fails:
            if effect is not Effect.REFUSE:
                self.roll_back(name)
            self.answers[name].append(m.Failed(order.attempt, "no"))
            return
        if effect is Effect.VERIFY:
            self.verified.add(name + member._new_version)
        if effect is Effect.COMMIT:
            self.held[name] = member._new_version
        member.done()
        self.answers[name].append(answer(order, self.coordinator.plan.digest, name in SOURCES))

    def roll_back(self, name):
        """As an engine with a shadow buffer does."""
        self.members[name].rolled_back()
        if name in TARGETS:
            self.held[name] = self.members[name].version

    @rule(name=st.sampled_from(SOURCES + TARGETS))
    def take_an_answer(self, name):
        if self.answers[name]:
            self.deliver(self.coordinator.receive(name, self.answers[name].pop(0), self.now))

    @rule(name=st.sampled_from(SOURCES + TARGETS))
    def give_up_on_the_coordinator(self, name):
        if self.members[name].waiting:
            self.roll_back(name)

    @rule(name=st.sampled_from(TARGETS))
    def restart(self, name):
        """A killed engine: its connection ends, and a new one joins without weights before the next attempt."""
        self.orders[name].clear()
        self.answers[name].clear()
        self.members[name] = Participant(source=False)
        self.held[name] = None
        self.deliver(self.coordinator.lost(name, "killed", self.now))
        self.orders[name].clear()

    @rule(seconds=st.sampled_from([1.0, 1000.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.deliver(self.coordinator.tick(self.now))

    @rule(turns=st.integers(1, 6), leave_out=st.sampled_from(TARGETS + [""] * 3))
    def some_progress(self, turns, leave_out):
        """Get into the middle of an attempt, where the other rules are of interest."""
        if self.coordinator.phase is Phase.IDLE:
            self.begin()
        for _ in range(turns):
            for name in self.members:
                if name != leave_out:
                    self.take_an_order(name, False)
            for name in self.members:
                if name != leave_out:
                    self.take_an_answer(name)

    @rule()
    def everything_goes_well(self):
        for _ in range(30):
            for name in self.members:
                self.take_an_order(name, False)
                self.take_an_answer(name)
        if self.coordinator.phase is Phase.IDLE:
            self.begin()
            for _ in range(30):
                for name in self.members:
                    self.take_an_order(name, False)
                    self.take_an_answer(name)
            # whoever is still in doubt or stuck holds up the transfer, and is named
            outcome = self.coordinator.outcome
            assert outcome.committed or outcome.cause or self.coordinator.phase is not Phase.IDLE

    @invariant()
    def only_one_version_is_served_and_it_was_verified_and_decided(self):
        served = {}
        for name in TARGETS:
            member = self.members[name]
            if member.serving:
                assert self.held[name] == member.version
                assert name + member.version in self.verified
                served[name] = member.version
        assert set(served.values()) <= set(self.decided)
        assert len(set(served.values())) <= 1, served


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


def drive(c: Coordinator, until: Phase) -> list:
    """Answer everything well up to a phase; returns the orders of that phase."""
    outgoing = c.begin(bytes(16), "v1", 0.0)
    while c.phase is not until:
        following = []
        for name, order in outgoing:
            following += c.receive(name, answer(order, c.plan.digest, name in SOURCES), 1.0)
        outgoing = following
    return outgoing


@pytest.mark.parametrize("phase", [Phase.PLAN, Phase.PREPARE, Phase.TRANSFER, Phase.VERIFY, Phase.COMMIT])
def test_a_passed_deadline_names_the_phase_and_those_waited_for(phase):
    c = coordinator()
    orders = drive(c, phase)
    for name, order in orders:
        if name != "rollout-1":
            c.receive(name, answer(order, c.plan.digest, name in SOURCES), 1.0)
    assert c.tick(c.deadline - 0.001) == []
    aborts = c.tick(c.deadline)
    assert {name for name, order in aborts if isinstance(order, m.Abort)} == set(SOURCES + TARGETS)
    assert c.outcome.cause == f"waited {c._limit(phase):g} s in {phase} for rollout-1"
    assert c.outcome.failed_in is phase
    for name in [*SOURCES, "rollout-0", "rollout-2"]:
        c.receive(name, m.Aborted(bytes(16), False), 2.0)
    c.tick(c.deadline)
    assert (c.phase, c.outcome.committed) == (Phase.IDLE, False)
    assert list(c.outcome.lost) == ["rollout-1"]


@pytest.mark.parametrize(
    ("phase", "reply", "cause"),
    [
        (Phase.PLAN, m.Planned(bytes(16), "0" * 32), "rollout-0 computed plan 0000"),
        (Phase.PLAN, m.Prepared(bytes(16), b""), "rollout-0 answered Prepared in plan"),
        (Phase.TRANSFER, m.Transferred(bytes(16), (DIGEST,), 0, 0.0), "rollout-0 sent 1 digests"),
        (Phase.VERIFY, m.Verified(bytes(16), DIGEST), "rollout-0 acknowledged other bytes than were sent"),
        (Phase.COMMIT, m.Failed(bytes(16), "no memory"), "rollout-0: no memory"),
    ],
)
def test_a_wrong_answer_aborts(phase, reply, cause):
    c = coordinator()
    drive(c, phase)
    assert any(isinstance(order, m.Abort) for _, order in c.receive("rollout-0", reply, 1.0))
    assert c.outcome.cause.startswith(cause)


def test_who_fails_while_others_are_told_to_abort_is_named_too():
    """A receiver that lost its sender may be heard before the sender says why."""
    c = coordinator()
    drive(c, Phase.TRANSFER)
    c.receive("rollout-0", m.Failed(bytes(16), "cut off"), 1.0)
    assert c.receive(SOURCES[0], m.Failed(bytes(16), "no memory"), 1.0) == []
    assert (c.phase, c.outcome.cause) == (Phase.ABORT, f"rollout-0: cut off; {SOURCES[0]}: no memory")


def test_answers_of_another_attempt_are_ignored():
    c = coordinator()
    drive(c, Phase.VERIFY)
    assert c.receive("rollout-0", m.Failed(bytes(range(16)), "old"), 1.0) == []
    assert c.phase is Phase.VERIFY


def test_who_fails_after_the_decision_is_named_and_the_version_stands():
    c = coordinator()
    orders = drive(c, Phase.RESUME)
    c.lost("rollout-2", "killed", 1.0)
    for name, order in orders:
        if name != "rollout-2":
            c.receive(name, answer(order, "", name in SOURCES), 1.0)
    assert c.outcome.committed
    assert c.outcome.lost == {"rollout-2": "killed"}


def test_two_transfers_at_once_are_refused():
    c = coordinator()
    drive(c, Phase.TRANSFER)
    with pytest.raises(WeightSyncError, match="'v1' is in transfer"):
        c.begin(bytes(16), "v2", 1.0)


def test_a_slow_transfer_is_refused():
    c = coordinator(floor_gb_per_s=1.0)
    outgoing = drive(c, Phase.TRANSFER)
    for name, order in outgoing:
        c.receive(name, answer(order, "", name in SOURCES), 100.0)
    assert "GB/s, the floor is 1" in c.outcome.cause


def order_all(member: Participant, *orders: m.Message) -> None:
    for order in orders:
        assert member.receive(order) is not Effect.REFUSE
        member.done()


A = bytes(16)
PLAN = m.Plan(A, "v1", layout(1), layout(3), 60.0, "ipc")


def test_a_receiver_without_a_shadow_buffer_is_quarantined_by_a_failed_transfer_only():
    member = Participant(source=False, in_place=True)
    order_all(member, PLAN, m.Prepare(A), m.Transfer(A, {}), m.Verify(A, ()), m.Commit(A), m.Resume(A))
    assert member.serving
    order_all(member, PLAN, m.Prepare(A))
    assert not member.serving  # drained
    member.rolled_back()
    assert member.serving  # nothing was written yet
    order_all(member, PLAN, m.Prepare(A))
    member.receive(m.Transfer(A, {}))
    assert member.rolled_back()
    assert (member.state, member.serving, member.version) == (State.QUARANTINED, False, None)
    order_all(member, PLAN, m.Prepare(A), m.Transfer(A, {}), m.Verify(A, ()), m.Commit(A), m.Resume(A))
    assert member.serving


def test_a_silent_coordinator_counts_as_gone_only_before_the_commit():
    """Whoever has committed may be the one that the decision waited for: going back alone would mix two versions."""
    member = Participant(source=False)
    assert not member.waiting
    for order in (PLAN, m.Prepare(A), m.Transfer(A, {}), m.Verify(A, ())):
        order_all(member, order)
        assert member.waiting
    order_all(member, m.Commit(A))
    assert not member.waiting
    assert not member.serving


@pytest.mark.parametrize(
    "order", [m.Transfer(A, {}), m.Verify(A, ()), m.Commit(A), m.Resume(A), m.Prepare(bytes(range(16)))]
)
def test_an_order_out_of_turn_is_refused(order):
    member = Participant(source=False)
    order_all(member, PLAN)
    assert member.receive(order) is Effect.REFUSE
    assert member.state is State.PLANNED
