"""Faults between healthy processes: links that go down, memory that is full, sides that do not fit together, old
metadata, two transfers at once. Each has a witness that it happened, and leaves one verified version."""

import contextlib
import itertools
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from parties import MODEL, ONE, ONE_ENGINE, QUICK, TOKEN, Engine, Parties, engine_buffers, eventually
from test_quantised import MODEL as QUANTISED
from test_transports import ends

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.quantised import FORMS, receiving_layout, sending_layout
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import disk, ipc, rdma

TWO_ENGINES = SglangSizes(engines=2)


@pytest.fixture
def start(tmp_path):
    """start(name, **options) -> Parties of one trainer and two engines; no socket may be left of them in the end."""
    running = []

    def make(name, wrap=lambda end: end, made=None, **options):
        sources, targets = made or ends(name, tmp_path, 1, 2)
        targets[-1] = wrap(targets[-1])
        running.append(Parties(tmp_path, sources, targets, rollout=TWO_ENGINES, **options))
        return running[-1]

    yield make
    for run in running:
        run.close()
    assert list(tmp_path.glob("*.ipc")) == []


def open_exports() -> int:
    """How many memory files of weights this process has open, the mapped ones of live versions included."""
    found = 0
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found += "memfd:zerokl-weights" in os.readlink(f"/proc/self/fd/{entry}")
    return found


class Interrupted:
    """A receiving end that does something just before it receives, once, when armed."""

    def __init__(self, inner):
        self.inner, self.name, self.armed, self.fired = inner, inner.name, None, None

    def prepare(self, job, room):
        return self.inner.prepare(job, room)

    def finish(self):
        self.inner.finish()

    def transfer(self, job, endpoints):
        if self.armed is not None:
            armed, self.armed = self.armed, None
            self.fired = armed()
        return self.inner.transfer(job, endpoints)


def tcp_connections() -> Iterator[socket.socket]:
    """Every TCP connection of this process, open while it is looked at."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or no connection
            if not stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as found:
                if found.family == socket.AF_INET and found.type == socket.SOCK_STREAM:
                    found.getpeername()
                    yield found


def cut_tcp() -> int:
    """Shut down every TCP connection of this process; how many."""
    cut = 0
    for found in tcp_connections():
        with contextlib.suppress(OSError):  # its other end was faster
            found.shutdown(socket.SHUT_RDWR)
            cut += 1
    return cut


def test_a_network_that_goes_down_aborts_and_the_next_transfer_connects_anew(start, fault_row):
    run = start("collective", Interrupted)
    end = run.receivers[1]._transport
    assert run.sync("v1", seed=1).committed
    end.armed = cut_tcp
    outcome = run.sync("v2", seed=2)
    assert end.fired > 0  # the witness
    assert (outcome.committed, outcome.failed_in) == (False, "transfer")
    assert outcome.cause.startswith(("trainer-0: failed", "rollout-"))
    assert run.serving() == ["v1", "v1"]
    assert run.all_hold(1)
    assert run.sync("v3", seed=3).committed
    assert run.all_hold(3)
    fault_row("collective: TCP cut", "transfer", f"{end.fired} sockets shut", outcome.cause)


@pytest.mark.parametrize("when", ["transfer", "before"])
def test_rdma_over_a_network_that_goes_down_starts_afresh(start, when, fault_row):
    """What UCX has under way may still arrive; its agents are of no use afterwards, and are replaced in the very next
    attempt."""
    ends_over_tcp = [rdma.RdmaSource(interface="lo")], [rdma.RdmaTarget(interface="lo") for _ in range(2)]
    run = start("rdma", Interrupted, made=ends_over_tcp, deadlines=replace(QUICK, transfer=5))
    end, source = run.receivers[1]._transport, run.sources[0]._transport
    assert run.sync("v1", seed=1).committed
    # so often TCP asks again before it gives up, and with it the thread that connects
    assert 2 in [found.getsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT) for found in tcp_connections()]
    agent, in_transfer = source._agent, when == "transfer"
    if in_transfer:
        end.armed = cut_tcp
        outcome = run.sync("v2", seed=2)
        assert outcome.committed or "write" in outcome.cause  # what was on its way may have arrived
        cause = outcome.cause or "it had all arrived"
    else:
        end.fired, cause = cut_tcp(), "not noticed before the next transfer"
    assert end.fired > 0  # the witness
    for seed in (3, 4, 5):
        outcome = run.sync(f"v{seed}", seed)
        assert outcome.committed, outcome
        assert run.serving() == [f"v{seed}"] * 2
        assert run.all_hold(seed)
    assert source._agent is not agent
    fault_row("rdma: TCP cut", when, f"{end.fired} sockets shut", f"{cause}; the next one commits")


def test_rdma_that_registers_nothing_with_a_new_agent_either_says_so(start, monkeypatch):
    run = start("rdma")
    assert run.sync("v1", seed=1).committed
    agent = run.sources[0]._transport._agent

    def refuse(*_):
        raise ValueError("no memory is good enough")

    monkeypatch.setattr(rdma._Agent, "register", refuse)
    outcome = run.sync("v2", seed=2)
    assert (outcome.committed, outcome.failed_in) == (False, "prepare")
    assert "NIXL cannot register memory: ValueError: no memory is good enough" in outcome.cause
    monkeypatch.undo()
    assert run.sync("v3", seed=3).committed
    assert run.all_hold(3)
    assert run.sources[0]._transport._agent is not agent


TRANSPORTS = ["ipc", "rdma", "collective", "disk"]
LOST = [("source", step) for step in ("plan", "prepare", "transfer", "resume")]
LOST += [("receiver", step) for step in ("plan", "prepare", "transfer", "verify", "commit", "resume")]


@pytest.fixture(scope="module", params=TRANSPORTS)
def lasting(request, tmp_path_factory):
    """Parties of one trainer and two engines for all of `LOST`, and the numbers of their versions."""
    folder = tmp_path_factory.mktemp(request.param)
    run = Parties(folder, *ends(request.param, folder, 1, 2), rollout=TWO_ENGINES)
    yield request.param, run, itertools.count(1)
    run.close()
    assert list(folder.glob("*.ipc")) == []


@pytest.mark.parametrize(("who", "step"), LOST)
def test_a_control_connection_lost_in_any_phase_leaves_one_version(lasting, who, step, monkeypatch, fault_row):
    name, run, numbers = lasting
    member = run.receivers[1] if who == "receiver" else run.sources[0]
    old, new, after = (next(numbers) for _ in range(3))
    assert run.sync(f"v{old}", old).committed
    first, dropped = member._connection, []

    def drop(now):
        if now == step and not dropped:
            dropped.append(now)
            first.close()

    monkeypatch.setattr(member, "_observe", drop)
    resume = run.engines[1].resume
    if (who, step) == ("receiver", "resume"):  # the loss is noticed meanwhile
        monkeypatch.setattr(run.engines[1], "resume", lambda version: (time.sleep(0.3), resume(version)))
    outcome = run.sync(f"v{new}", new)
    assert dropped  # the witness
    decided = step == "resume"
    assert outcome.committed == decided
    assert outcome.failed_in == ("idle" if decided else step)
    # named as the cause, or as lost where another one that failed because of it was heard before
    assert member.name in {*outcome.lost, "" if decided else outcome.cause.partition(":")[0]}
    eventually(lambda: member._connection is not first)
    run.sender.wait(30)
    seed = new if decided else old
    # who had committed when it lost the coordinator cannot know what the others serve, until RESUME tells it
    either = {f"v{seed}", None} if who == "receiver" and step == "commit" else {f"v{seed}"}
    eventually(lambda: run.serving()[0] == f"v{seed}" and run.serving()[1] in either)
    assert run.engines[0].holds(engine_buffers(MODEL, ONE_ENGINE, 0, seed))
    outcome_after = run.sync(f"v{after}", after)
    assert outcome_after.committed, outcome_after
    assert run.serving() == [f"v{after}"] * 2
    assert run.all_hold(after)
    assert all(engine.running for engine in run.engines)
    fault_row(f"{name}: control of {member.name} lost", step, "closed", f"{outcome.cause or outcome.lost}")


@contextlib.contextmanager
def little_room(nbytes: int):
    """The kernel refuses files, those in memory included, beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("name", "cause"), [("ipc", "cannot export"), ("disk", "cannot write weights to")])
def test_full_memory_at_the_sender_aborts_with_its_name(start, name, cause, fault_row):
    run = start(name)
    assert run.sync("v1", seed=1).committed
    run.load(2)
    files = open_exports()
    with little_room(4096):
        outcome = run.sender.sync("v2")
    assert (outcome.committed, outcome.failed_in) == (False, "transfer")
    # the witness: the sender says why, or a receiver that it broke off, whoever is heard first
    assert outcome.cause.startswith(f"trainer-0: {cause}") or "trainer-0 does not hand over" in outcome.cause
    assert open_exports() <= files
    assert run.serving() == ["v1", "v1"]
    assert run.all_hold(1)
    assert run.sync("v3", seed=3).committed
    assert run.all_hold(3)
    fault_row(f"{name}: no room for files", "transfer", "EFBIG", outcome.cause)


def sides(tmp_path, left, right):
    """A sender, and members with these two layouts, connected."""
    tmp_path.chmod(0o700)
    sender = WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1, deadlines=QUICK)
    source = WeightSource(tmp_path / "s", TOKEN, left, 0, ipc.IpcSource(tmp_path))
    receiver = WeightReceiver(tmp_path / "s", TOKEN, right, 0, ipc.IpcTarget(), Engine())
    for member in (source, receiver):
        member.start()
    sender.wait(30)
    return sender, source, receiver


WIDER = replace(MODEL, ffn=32)
HALF = replace(MODEL, dtype="float16")
QUANTISED_LEFT, QUANTISED_RIGHT = megatron_layout(QUANTISED, ONE), sglang_layout(QUANTISED, ONE_ENGINE)


@pytest.mark.parametrize(
    ("left", "right", "named"),
    [
        (megatron_layout(MODEL, ONE), sglang_layout(WIDER, ONE_ENGINE), r"shape=\(24, 32\)|shape=\(32, 24\)"),
        (megatron_layout(MODEL, ONE), sglang_layout(HALF, ONE_ENGINE), "dtype='float16'"),
        (
            sending_layout(QUANTISED_LEFT, FORMS["int4_group128"]),
            receiving_layout(QUANTISED_RIGHT, FORMS["int4_group32"]),
            r"weight_scale', shape=\(\d+, \d+\)",
        ),
        (
            sending_layout(QUANTISED_LEFT, FORMS["fp8_block"]),
            receiving_layout(QUANTISED_RIGHT, FORMS["fp8_block_hopper"]),
            "weight_scale_inv:hopper', shape",
        ),
        (QUANTISED_LEFT, receiving_layout(QUANTISED_RIGHT, FORMS["fp8_block"]), "dtype='float8_e4m3fn'"),
    ],
    ids=["shape", "dtype", "scales", "scale layout", "form"],
)
def test_sides_that_do_not_fit_together_are_refused_before_anything_moves(
    tmp_path, left, right, named, fault_row, request
):
    sender, source, receiver = sides(tmp_path, left, right)
    try:
        with pytest.raises(WeightSyncError, match=f"rollout-0 has another model than trainer-0.*({named})") as refused:
            sender.sync("v1")
        assert receiver.serving is None
        fault_row(f"sides that differ in {request.node.callspec.id}", "plan", "both layouts", str(refused.value)[:200])
    finally:
        sender.close()
        source.close()
        receiver.close()


def test_a_damaged_scale_is_found_and_named(start, fault_row):
    run = start("rdma", ScaleDamage, model=QUANTISED, form=FORMS["fp8_block"])
    assert run.sync("v1", seed=1).committed
    run.receivers[1]._transport.armed = True
    outcome = run.sync("v2", seed=2)
    assert run.receivers[1]._transport.fired == 1
    assert (outcome.committed, outcome.failed_in) == (False, "verify")
    assert outcome.cause.startswith(
        "rollout-1: tensor 'model.layers.0.self_attn.o_proj.weight_scale_inv' from trainer-0"
    )
    assert run.serving() == ["v1", "v1"]
    assert run.sync("v3", seed=3).committed
    assert run.serving() == ["v3", "v3"]
    fault_row("rdma: last bit of a scale", "verify", "1 scale changed", outcome.cause)


class ScaleDamage:
    """A receiving end that changes one scale by its last bit, once, when armed."""

    def __init__(self, inner):
        self.inner, self.name, self.armed, self.fired = inner, inner.name, False, 0

    def prepare(self, job, room):
        return self.inner.prepare(job, room)

    def finish(self):
        self.inner.finish()

    def transfer(self, job, endpoints):
        arrived = self.inner.transfer(job, endpoints)
        if self.armed:
            self.armed, self.fired = False, self.fired + 1
            scales = arrived.buffers["model.layers.0.self_attn.o_proj.weight:scales"].clone()
            scales[0] ^= 1
            buffers = dict(arrived.buffers) | {"model.layers.0.self_attn.o_proj.weight:scales": scales}
            return type(arrived)(buffers, arrived.copied_bytes)
        return arrived


class Stale:
    """A sending or receiving end that announces, once, when armed, what it had announced in the attempt before."""

    def __init__(self, inner):
        self.inner, self.name, self.armed, self.fired, self.last = inner, inner.name, False, 0, b""

    def prepare(self, job, given):
        said, before = self.inner.prepare(job, given), self.last
        self.last = said
        if self.armed:
            self.armed, self.fired = False, self.fired + 1
            return before
        return said

    def transfer(self, job, endpoints):
        return self.inner.transfer(job, endpoints)

    def finish(self):
        self.inner.finish()


def test_stale_metadata_of_a_restarted_sender_leads_nowhere(start, tmp_path, fault_row):
    source = Stale(ipc.IpcSource(tmp_path))
    run = start("ipc", made=([source], [ipc.IpcTarget() for _ in range(2)]))
    assert run.sync("v1", seed=1).committed
    source.armed = True
    outcome = run.sync("v2", seed=2)
    assert source.fired == 1
    assert (outcome.committed, outcome.failed_in) == (False, "transfer")
    assert "trainer-0 does not hand over its weights" in outcome.cause
    assert run.serving() == ["v1", "v1"]
    assert run.all_hold(1)
    assert run.sync("v3", seed=3).committed
    fault_row("ipc: stale metadata of the sender", "transfer", "announced again", outcome.cause)


def test_stale_metadata_of_a_restarted_receiver_cannot_pass_for_its_memory(start, fault_row):
    """The restarted engine's memory is not the one announced: whatever is written, it never acknowledges."""
    sources, targets = [rdma.RdmaSource()], [rdma.RdmaTarget(), rdma.RdmaTarget()]
    old = Stale(targets[1])
    run = start("rdma", made=(sources, [targets[0], old]), deadlines=replace(QUICK, transfer=4))
    assert run.sync("v1", seed=1).committed
    old.inner._agent.forget()
    old.inner._agent = rdma._Agent("")  # as after a restart: another agent, another registration
    old.armed = True
    outcome = run.sync("v2", seed=2)
    assert old.fired == 1
    assert not outcome.committed
    assert outcome.failed_in == "transfer"
    assert run.serving() == ["v1", "v1"]
    assert run.all_hold(1)
    assert run.sync("v3", seed=3).committed
    assert run.all_hold(3)
    fault_row("rdma: stale metadata of an engine", "transfer", "announced again", outcome.cause)


def test_a_sender_that_starts_a_new_chain_leaves_the_others_theirs(start, tmp_path):
    """As after its restart: ranks do not write their complete versions at the same time any more."""
    sources = [disk.DiskSource(tmp_path / "disk", complete_every=every, delta_below=2) for every in (1, 8)]
    targets = [disk.DiskTarget(), disk.DiskTarget()]
    run = start("disk", made=(sources, targets), trainer=MegatronSizes(tp=2, vocabulary_multiple=4))
    for seed in (1, 2, 3):
        assert run.sync(f"v{seed}", seed).committed
    targets[1]._held = {}  # a new engine: it reads whole chains
    outcome = run.sync("v4", 4)
    assert outcome.committed, outcome
    assert run.all_hold(4)
    assert len(list(tmp_path.glob("disk/*/trainer-0.json"))) == 1
    assert len(list(tmp_path.glob("disk/*/trainer-1.json"))) == 4


def test_a_second_transfer_at_the_same_time_is_refused_and_the_first_one_completes(start, monkeypatch, fault_row):
    run = start("rdma", Interrupted)
    end, reached, go_on = run.receivers[1]._transport, threading.Event(), threading.Event()

    def hold():
        reached.set()
        return go_on.wait(60)

    end.armed = hold
    run.load(1)
    outcomes = []
    first = threading.Thread(target=lambda: outcomes.append(run.sender.sync("v1")))
    first.start()
    assert reached.wait(30)
    monkeypatch.setattr(run.sender, "_plan", None)  # it must not come so far: before that it takes from the inbox
    with pytest.raises(WeightSyncError, match="cannot start a transfer of 'v2': that of 'v1' is in transfer"):
        run.sender.sync("v2")
    monkeypatch.undo()
    go_on.set()
    first.join(30)
    assert outcomes[0].committed
    assert run.all_hold(1)
    fault_row("rdma: a second transfer at once", "transfer", "held in transfer", "refused; the first one commits")
