"""Every transport behind the same protocol: what arrives, what it costs, and what damage on the way leads to."""

import shutil
import threading
import time
from datetime import timedelta

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import MODEL, Parties, trainer_buffers

from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import ModelShape
from zerokl.weightsync.plan import Plan, make_plan
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, delta, disk, ipc, rdma
from zerokl.weightsync.transports.base import Cancelled, Job, Room, TransferError
from zerokl.weightsync.transports.ipc_layout import arrange, parse_export

NAMES = ["ipc", "rdma", "collective", "disk"]
TRAINER, ROLLOUT = MegatronSizes(tp=2, pp=2, vocabulary_multiple=4), SglangSizes(tp=2, engines=2)


def ends(name, folder, sources, targets):
    """(sending ends, receiving ends) of a transport."""
    if name == "ipc":
        return [ipc.IpcSource(folder) for _ in range(sources)], [ipc.IpcTarget() for _ in range(targets)]
    if name == "rdma":
        return [rdma.RdmaSource() for _ in range(sources)], [rdma.RdmaTarget() for _ in range(targets)]
    if name == "collective":
        size = {"ranks": (sources, targets)}
        return (
            [collective.CollectiveSource(folder, **size) for _ in range(sources)],
            [collective.CollectiveTarget(folder, **size) for _ in range(targets)],
        )
    return [disk.DiskSource(folder / "disk", complete_every=3, delta_below=2) for _ in range(sources)], [
        disk.DiskTarget() for _ in range(targets)
    ]


@pytest.fixture
def start(tmp_path):
    """start(name, trainer's sizes, rollout's sizes, damage) -> Parties."""
    running = []

    def make(name, trainer=MegatronSizes(), rollout=SglangSizes(), damage=None, **options):  # noqa: B008
        sources, targets = ends(name, tmp_path, trainer.tp * trainer.dp * trainer.pp, rollout.tp * rollout.engines)
        if damage is not None:
            targets[-1] = damage(targets[-1])
        running.append(Parties(tmp_path, sources, targets, trainer=trainer, rollout=rollout, **options))
        return running[-1]

    yield make
    for run in running:
        run.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_gets_every_version(start, name):
    run = start(name, TRAINER, ROLLOUT)
    for version in range(5):
        outcome = run.sync(f"v{version}", seed=version)
        assert outcome.committed, outcome.cause
        assert run.serving() == [f"v{version}"] * 4
        assert run.all_hold(version)


@pytest.mark.parametrize("name", NAMES)
def test_speed(start, name, capsys):
    """Prints what the machine does; a floor far above it must refuse."""
    model = ModelShape(49152, 576, 1536, 2, 9, 3, 64, tied=True)
    run = start(name, model=model)
    run.sources[0]._transport._delta_below = 0.25
    assert run.sync("cold", seed=0).committed
    for seed in (1, 2):
        outcome = run.sync(f"v{seed}", seed=seed)
        assert outcome.committed
    size = sum(tensor.nbytes for tensor in model.tensors().values())
    assert outcome.bytes == size
    with capsys.disabled():
        verify = outcome.seconds["verify"]
        print(
            f"\n{name:>10}: {size / 1e6:.0f} MB in {outcome.seconds['transfer']:.3f} s, {outcome.gb_per_s:.2f} GB/s, "
            f"{outcome.copied_bytes / size:.2f} copies, verified in {verify:.3f} s"
        )
    run.sender._floor = 1e4
    run.sender._coordinator = None
    assert "the floor is 10000" in run.sync("refused", seed=3).cause
    assert run.serving() == ["v2"]


class Damaged:
    """A receiving end whose bytes are damaged on arrival, once it is armed."""

    def __init__(self, inner):
        self.inner, self.name, self.kind, self.fired = inner, inner.name, None, []

    def prepare(self, job, room):
        return self.inner.prepare(job, room)

    def finish(self):
        self.inner.finish()

    def transfer(self, job, endpoints):
        arrived = self.inner.transfer(job, endpoints)
        if self.kind is None:
            return arrived
        buffers = {name: buffer.clone() for name, buffer in arrived.buffers.items()}
        copies = [copy for batch in job.received() for copy in batch.copies if copy.rows == 1]
        first, twin = next(
            (c, d) for i, c in enumerate(copies) for d in copies[i + 1 :] if c.row_bytes == d.row_bytes > 16
        )
        a, b = (buffers[c.target_buffer][c.target_offset : c.target_offset + c.row_bytes] for c in (first, twin))
        before = a.clone()
        if self.kind == "flipped bit":
            a[7] ^= 16
        elif self.kind == "truncated":
            a[-2:] = 0
        elif self.kind == "missing":
            a[:] = 0
        elif self.kind == "duplicated":
            a[:] = b
        elif self.kind == "reordered":
            a[:], b[:] = b.clone(), before
        if not torch.equal(a, before):
            self.fired.append((self.kind, first.tensor))
        return type(arrived)(buffers, arrived.copied_bytes)


@pytest.mark.parametrize("name", NAMES)
def test_damage_on_the_way_is_found_and_changes_nothing(start, name, fault_row):
    run = start(name, rollout=SglangSizes(engines=2), damage=Damaged)
    damaged = run.receivers[-1]._transport
    assert run.sync("v1", seed=1).committed
    kinds = ["flipped bit", "truncated", "missing", "duplicated", "reordered"]
    for number, damaged.kind in enumerate(kinds):
        outcome = run.sync(f"bad {number}", seed=10 + number)
        assert (outcome.committed, outcome.failed_in) == (False, "verify"), outcome.cause
        kind, tensor = damaged.fired[number]  # the witness
        assert kind == damaged.kind
        assert outcome.cause.startswith(f"rollout-1: tensor {tensor!r} from trainer-0")
        assert run.serving() == ["v1", "v1"]
        assert run.all_hold(1)
        fault_row(f"{name}: {kind}", "verify", "bytes changed", outcome.cause)
    damaged.kind = None
    assert run.sync("v2", seed=2).committed
    assert run.all_hold(2)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_updated_in_place_is_quarantined_by_damage_until_a_complete_transfer(start, name, fault_row):
    run = start(name, rollout=SglangSizes(engines=2), damage=InPlaceDamage, in_place=True)
    damaged = run.receivers[-1]._transport
    assert run.sync("v1", seed=1).committed
    own = run.receivers[0]._room.live["model.norm.weight"].data_ptr()
    damaged.armed = True
    outcome = run.sync("v2", seed=2)
    assert (outcome.committed, outcome.failed_in, damaged.fired) == (False, "verify", 1)
    assert outcome.quarantined == {"rollout-0", "rollout-1"}  # both had been written to
    assert run.serving() == [None, None]
    assert run.sync("v3", seed=3).committed
    assert run.serving() == ["v3", "v3"]
    assert run.all_hold(3)
    assert run.engines[0].buffers["model.norm.weight"].data_ptr() == own
    fault_row(f"{name}: flipped bit, in place", "verify", "bit flipped", f"quarantined; {outcome.cause}")


class InPlaceDamage:
    """A receiving end that flips one bit of what it wrote, once, when armed."""

    def __init__(self, inner):
        self.inner, self.name, self.armed, self.fired = inner, inner.name, False, 0

    def prepare(self, job, room):
        return self.inner.prepare(job, room)

    def finish(self):
        self.inner.finish()

    def transfer(self, job, endpoints):
        arrived = self.inner.transfer(job, endpoints)
        if self.armed:
            arrived.buffers["model.norm.weight"][1] ^= 1
            self.armed, self.fired = False, self.fired + 1
        return arrived


def test_memory_is_handed_only_to_who_knows_the_nonce(tmp_path):
    left, right = megatron_layout(MODEL, MegatronSizes()), sglang_layout(MODEL, SglangSizes())
    job = Job(bytes(16), "v", make_plan(left, right), 0)
    source, target = ipc.IpcSource(tmp_path), ipc.IpcTarget()
    said = source.prepare(job, trainer_buffers(MODEL, MegatronSizes(), 0, 1))
    export, endpoints = parse_export(said), {"trainer-0": said}
    endpoints["rollout-0"] = target.prepare(job, Room(right.ranks[0].buffers))
    nbytes = arrange(job.plan, 0, endpoints).nbytes
    serving = threading.Thread(target=source.transfer, args=(job, endpoints), daemon=True)
    serving.start()
    wrong = msgspec.structs.replace(export, nonce=bytes(16))
    with pytest.raises(TransferError, match="trainer-0 refused to hand over"):
        target._fetch(job, "trainer-0", wrong, nbytes)
    assert target._fetch(job, "trainer-0", export, nbytes).numel() == nbytes
    serving.join(10)
    source.finish()
    assert list(tmp_path.glob("*.ipc")) == []


def test_a_rendezvous_that_others_miss_ends_with_its_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr(collective, "_CONNECT", timedelta(seconds=3))
    job = Job(bytes(16), "v", Plan((), ""), 0, deadline=time.monotonic() + 60)
    threading.Timer(0.2, job.cancelled.set).start()
    with pytest.raises(Cancelled, match="called off while waiting for all ranks to connect"):
        collective.CollectiveSource(tmp_path, ranks=(1, 1)).transfer(job, {})
    alone = Job(bytes(16), "w", Plan((), ""), 0, deadline=time.monotonic() + 60)
    with pytest.raises(TransferError, match="the ranks did not all connect: "):
        collective.CollectiveSource(tmp_path, ranks=(1, 1)).transfer(alone, {})


def shard_of_last(folder):
    (newest,) = [p for p in (folder / "disk").iterdir() if len(disk.read_manifest(p / "trainer-0.json").chain) == 2]
    return newest / "trainer-0.safetensors"


def test_disk_writes_changes_only_and_starts_again(start, tmp_path):
    run = start("disk")
    assert run.sync("v1", seed=1).committed
    run.sources[0].buffers["decoder.final_layernorm.weight"][5] += 1
    outcome = run.sender.sync("v2")
    assert outcome.committed
    sizes = sorted(p.stat().st_size for p in (tmp_path / "disk").rglob("*.safetensors"))
    assert sizes[0] < sizes[1] / 4
    for version in range(3, 12):
        assert run.sync(f"v{version}", seed=version % 3).committed
        assert run.all_hold(version % 3)
    assert len(list((tmp_path / "disk").iterdir())) <= 4


def test_a_receiver_without_the_base_reads_the_whole_chain(start):
    run = start("disk", rollout=SglangSizes(engines=2))
    assert run.sync("v1", seed=1).committed
    run.receivers[1]._transport._held = {}  # as after a restart
    assert run.sync("v2", seed=2).committed
    assert run.all_hold(2)


def test_a_delta_on_the_wrong_base_is_found(start, fault_row):
    run = start("disk")
    assert run.sync("v1", seed=1).committed
    run.receivers[0]._room.live["model.norm.weight"][3] ^= 1  # no longer what v1 was
    run.load(1)
    run.sources[0].buffers["decoder.layers.0.input_layernorm.weight"][0] ^= 1  # v2 changes something else only
    outcome = run.sender.sync("v2")
    assert outcome.failed_in == "verify"
    assert "tensor 'model.norm.weight'" in outcome.cause
    fault_row("disk: a delta on the wrong base", "verify", "bit flipped", outcome.cause)
    run.load(1)  # v3 changes nothing that v2 had not: only a read from the last complete version on gets it right
    assert run.sender.sync("v3").committed
    assert run.all_hold(1)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:100] + b"\0" + p.read_bytes()[101:]), "is damaged"),
        (lambda p: p.unlink(), "cannot read"),
        (lambda p: p.with_suffix(".json").write_text("{}"), "is no manifest"),
        (lambda p: shutil.rmtree(p.parent), "is no manifest"),
    ],
)
def test_a_damaged_link_of_the_chain_is_named(start, tmp_path, damage, cause, fault_row):
    run = start("disk")
    assert run.sync("v1", seed=1).committed
    assert run.sync("v2", seed=2).committed
    run.receivers[0]._transport._held = {}
    damage(shard_of_last(tmp_path))
    outcome = run.sync("v3", seed=3)
    assert outcome.failed_in == "transfer"
    assert cause in outcome.cause
    fault_row(f"disk: a link of the chain {cause}", "transfer", "file changed", outcome.cause)
    assert "trainer-0" in outcome.cause
    assert run.serving() == ["v2"]
    for _ in range(3):  # until a complete version comes
        if (outcome := run.sync("v4", seed=4)).committed:
            break
    assert outcome.committed
    assert run.all_hold(4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.binary(min_size=0, max_size=200), st.data())
def test_a_delta_gives_back_the_new_version(old, data):
    new = data.draw(st.binary(min_size=len(old), max_size=len(old)))
    before, after = (torch.frombuffer(bytearray(x) or bytearray(1), dtype=torch.uint8) for x in (old, new))
    positions, values = delta.decode(*delta.encode(before, after), before.numel())
    before.numpy()[positions] = values
    assert torch.equal(before, after)


def test_rdma_registers_memory_that_was_cut_differently_before(start):
    """A trainer may hold each version elsewhere, in memory that an earlier one had, cut at other places."""
    run = start("rdma")
    arena = torch.empty(1 << 20, dtype=torch.uint8)
    source = run.sources[0]
    for version in range(6):
        run.load(version)
        moved, place = {}, 2000 * (version % 3)
        for name, buffer in source.buffers.items():
            moved[name] = arena[place : place + buffer.numel()].copy_(buffer)
            place += buffer.numel() + 48
        source.buffers = dict(moved)
        outcome = run.sender.sync(f"v{version}")
        assert outcome.committed, outcome.cause
        assert run.all_hold(version)
