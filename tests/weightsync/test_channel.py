"""The whole protocol in one process over the `ipc` transport: what arrives, what is copied, and what is refused."""

import socket
import threading
import time
from dataclasses import replace

import parties
import pytest
import torch
from parties import MODEL, TOKEN, Parties, eventually

from zerokl.weightsync import messages as m
from zerokl.weightsync import wire
from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.megatron_layout import MegatronSizes
from zerokl.weightsync.protocol import Deadlines
from zerokl.weightsync.sglang_layout import SglangSizes
from zerokl.weightsync.transports.ipc import IpcSource, IpcTarget


@pytest.fixture
def start(tmp_path):
    """start(sources, targets, ...) -> Parties over ipc."""
    running = []

    def make(sources=1, targets=1, **options):
        running.append(
            Parties(
                tmp_path,
                [IpcSource(tmp_path) for _ in range(sources)],
                [IpcTarget() for _ in range(targets)],
                **options,
            )
        )
        return running[-1]

    yield make
    for parties_ in running:
        parties_.close()


def test_every_rank_gets_each_version_and_serves_it(start):
    trainer = MegatronSizes(tp=2, pp=2, vocabulary_multiple=4)
    run = start(4, 4, trainer=trainer, rollout=SglangSizes(tp=2, engines=2))
    assert run.serving() == [None] * 4
    for version in range(3):
        outcome = run.sync(f"v{version}", seed=version)
        assert outcome.committed, outcome.cause
        assert not outcome.lost
        assert run.serving() == [f"v{version}"] * 4
        assert run.all_hold(version)
    assert run.engines[0].calls == [c for v in range(3) for c in ("pause", f"install v{v}", f"resume v{v}")]


def test_engines_view_one_export_in_their_own_form_and_copy_nothing(start):
    run = start(1, 2, rollout=SglangSizes(engines=2))
    assert run.sync("v", seed=1).committed
    outcome = run.sync("w", seed=2)
    held = run.sources[0].buffers
    size = sum(t.nbytes for t in MODEL.tensors().values())
    assert outcome.bytes == 2 * size
    assert outcome.copied == {"trainer-0": size, "rollout-0": 0, "rollout-1": 0}
    for engine in run.engines:  # fused and padded parameters too
        assert len({x.untyped_storage().data_ptr() for x in engine.buffers.values()}) == 1
    # later changes at the trainer do not reach the engine
    for buffer in held.values():
        buffer.add_(1)
    assert run.all_hold(2)


def test_only_what_several_ranks_hold_parts_of_is_copied_by_the_engine(start):
    run = start(2, 1, trainer=MegatronSizes(tp=2, vocabulary_multiple=4))
    outcome = run.sync("v", seed=1)
    assert outcome.committed, outcome.cause
    assert run.all_hold(1)
    size = sum(t.nbytes for t in MODEL.tensors().values())
    norms = sum(t.nbytes for name, t in MODEL.tensors().items() if "norm" in name)
    assert outcome.copied_by_engines == size - norms
    assert outcome.copied_bytes == 2 * size - norms
    views = {x.untyped_storage().data_ptr() for name, x in run.engines[0].buffers.items() if "norm" in name}
    assert len(views) <= 2


def test_what_is_served_does_not_change_while_the_next_version_arrives(start):
    """Parts of it lie in memory of several senders, each of which must know."""
    seen = []

    def look(phase):
        if run.version and phase in ("transfer", "verify"):
            seen.append((run.serving(), run.all_hold(run.version)))

    sizes = MegatronSizes(tp=2, vocabulary_multiple=4)
    run = start(2, 2, trainer=sizes, rollout=SglangSizes(engines=2), observe=look)
    run.version = 0
    for seed in (1, 2, 3, 4):
        assert run.sync(f"v{seed}", seed).committed
        assert run.all_hold(seed)
        run.version = seed

    def fail(*_):
        raise RuntimeError("torn")

    run.engines[1].install = fail
    outcome = run.sync("v5", 5)
    assert (outcome.committed, outcome.failed_in) == (False, "commit")
    assert run.all_hold(4)
    assert [whole for _, whole in seen] == [True] * 8, seen


def test_a_second_transfer_at_once_is_refused_and_does_not_disturb_the_first(start):
    refused = []

    def second(phase):
        with pytest.raises(WeightSyncError, match=f"that of 'first' is in {phase}"):
            run.sender.sync("second")
        refused.append(phase)

    run = start(observe=second)
    assert run.sync("first", seed=1).committed
    assert refused == ["plan", "prepare", "transfer", "verify", "commit", "resume"]
    assert run.serving() == ["first"]
    assert run.all_hold(1)


@pytest.mark.parametrize("in_flight", ["abort", "retract", "continue"])
def test_every_engine_is_told_what_to_do_with_requests_under_way(start, in_flight):
    run = start(1, 2, rollout=SglangSizes(engines=2))
    run.load(1)
    outcome = run.sender.sync("v", in_flight=in_flight)
    assert outcome.committed
    assert [engine.in_flight for engine in run.engines] == [in_flight] * 2
    assert outcome.paused_s > 0


def test_who_hears_nothing_from_the_coordinator_gives_up(start):
    """As soon as the longest phase's time and that of an abort have passed, which the coordinator has said in PLAN."""
    silent, over = threading.Event(), threading.Event()
    run = start(1, 2, rollout=SglangSizes(engines=2), observe=lambda _: silent.is_set() and over.wait(60))
    assert run.sync("v1", seed=1).committed
    silent.set()
    patient = Deadlines(plan=0.1, prepare=0.2, transfer=0.3, verify=0.1, commit=0.1, resume=60, abort=0.2)
    syncing = threading.Thread(target=lambda: run.sender.sync("v2", deadlines=patient))
    began = time.monotonic()
    syncing.start()
    try:
        for receiver in run.receivers:
            eventually(lambda member=receiver: member.last_error == "waited for the coordinator in state planned")
        assert time.monotonic() - began >= 0.3 + 0.2
        assert run.serving() == ["v1", "v1"]
    finally:
        over.set()
        syncing.join()
    assert run.sync("v3", seed=3).committed
    assert run.all_hold(3)


def test_a_slow_transport_is_refused(start):
    run = start(floor_gb_per_s=1e6)
    outcome = run.sync("v", seed=1)
    assert not outcome.committed
    assert "the floor is 1e+06" in outcome.cause
    assert run.serving() == [None]


def test_who_resumes_too_late_takes_part_in_the_next_transfer(start):
    go_on = threading.Event()
    run = start(1, 2, rollout=SglangSizes(engines=2))
    late, resume = run.engines[1], run.engines[1].resume
    late.resume = lambda version: go_on.wait(60) and resume(version)
    run.load(1)
    outcome = run.sender.sync("v1", deadlines=replace(parties.QUICK, resume=0.2))
    assert outcome.committed
    assert outcome.lost.keys() == {"rollout-1"}
    run.load(2)
    outcomes = []
    syncing = threading.Thread(target=lambda: outcomes.append(run.sender.sync("v2")))
    syncing.start()
    time.sleep(0.2)  # the order to plan has arrived
    go_on.set()
    syncing.join()
    assert outcomes[0].committed, outcomes
    assert run.serving() == ["v2", "v2"]
    assert run.all_hold(2)


def test_a_failure_while_installing_restores_the_old_version_everywhere(start):
    run = start(1, 2, rollout=SglangSizes(engines=2))
    assert run.sync("v1", seed=1).committed
    broken, install = run.engines[1], run.engines[1].install

    def fail(version, buffers):
        install(version, buffers)
        raise RuntimeError("out of memory")

    broken.install = fail
    outcome = run.sync("v2", seed=2)
    assert (outcome.committed, outcome.failed_in) == (False, "commit")
    assert outcome.cause == "rollout-1: RuntimeError: out of memory"
    assert run.serving() == ["v1", "v1"]
    assert run.all_hold(1)
    broken.install = install
    assert run.sync("v2", seed=2).committed
    assert run.all_hold(2)


def test_an_engine_that_cannot_go_back_is_quarantined_until_a_complete_transfer(start):
    run = start(1, 2, rollout=SglangSizes(engines=2))
    assert run.sync("v1", seed=1).committed
    broken = run.engines[1]

    def fail(*_):
        raise RuntimeError("torn")

    broken.install = broken.restore = fail
    outcome = run.sync("v2", seed=2)
    assert not outcome.committed
    eventually(lambda: run.serving() == ["v1", None])
    assert run.receivers[1].machine.state == "quarantined"
    del broken.install, broken.restore
    assert run.sync("v3", seed=3).committed
    assert run.serving() == ["v3", "v3"]
    assert run.all_hold(3)


def test_a_missing_engine_stops_the_others_from_getting_ahead(start):
    run = start(1, 2, rollout=SglangSizes(engines=2))
    assert run.sync("v1", seed=1).committed
    run.receivers[1].close()
    eventually(lambda: not run.receivers[1]._thread.is_alive())
    eventually(lambda: run.sender._inbox.qsize() > 0)  # the coordinator has read that it is gone
    with pytest.raises(WeightSyncError, match="rollout-1 not connected"):
        run.sync("v2", seed=2)
    assert run.serving()[0] == "v1"


def test_a_trainer_buffer_of_the_wrong_size_is_named(start):
    run = start()
    run.load(1)
    run.sources[0].buffers = dict(run.sources[0].buffers) | {"decoder.final_layernorm.weight": torch.zeros(3)}
    outcome = run.sender.sync("v")
    assert not outcome.committed
    assert outcome.cause.startswith("trainer-0: buffer 'decoder.final_layernorm.weight' should hold 48 bytes")


@pytest.fixture
def listener(tmp_path):
    tmp_path.chmod(0o700)
    with WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1) as sender:
        yield sender


def test_strangers_are_turned_away(listener, tmp_path):
    for token, message in ((bytes(32), "closed"), (TOKEN, None)):
        connection = wire.connect(tmp_path / "s", 5)
        if message:
            with pytest.raises(wire.ConnectionLost, match=message):
                wire.introduce(connection, token, source=True, rank=0, deadline=time.monotonic() + 5)
        else:
            wire.introduce(connection, token, source=True, rank=0, deadline=time.monotonic() + 5)
        connection.close()
    assert listener.missing == ["trainer-0", "rollout-0"]


def test_an_impostor_of_a_coordinator_is_turned_away(tmp_path):
    ours, theirs = socket.socketpair()

    def impostor():
        connection = wire.Connection(theirs)
        connection.send(m.Challenge(bytes(16)))
        connection.receive(m.Hello)
        connection.send(m.Welcome(bytes(32)))

    threading.Thread(target=impostor, daemon=True).start()
    with pytest.raises(wire.ConnectionLost, match="coordinator does not know the run's token"):
        wire.introduce(wire.Connection(ours), TOKEN, source=True, rank=0, deadline=time.monotonic() + 5)


def test_who_leaves_while_it_connects_again_is_gone(start, monkeypatch):
    run = start()
    member, connect, leaving = run.receivers[0], wire.connect, []

    def late(address, timeout_s):
        connection = connect(address, timeout_s)
        if not leaving:
            leaving.append(threading.Thread(target=member.close, daemon=True))
            leaving[0].start()
            eventually(member._closing.is_set)
            time.sleep(0.1)  # it has closed the connection before
        return connection

    monkeypatch.setattr(wire, "connect", late)
    member._connection.close()
    eventually(lambda: leaving)
    leaving[0].join(20)
    assert not leaving[0].is_alive()


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(WeightSyncError, match="must belong to this user alone"):
        WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1)


def test_only_expected_names_are_let_in_and_only_once(listener, tmp_path):
    layout = parties.megatron_layout(MODEL, MegatronSizes())
    first = parties.WeightSource(tmp_path / "s", TOKEN, layout, 0, IpcSource(tmp_path))
    first.start()
    with pytest.raises(TimeoutError, match=r"for rollout-0 to connect"):
        listener.wait(1)
    second = parties.WeightSource(tmp_path / "s", TOKEN, layout, 0, IpcSource(tmp_path))
    second.start()
    with pytest.raises(TimeoutError):
        listener.wait(0.5)
    assert second.last_error == "the connection was closed"
    assert first.last_error == ""
    first.close()
    second.close()
