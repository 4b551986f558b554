"""Device memory by handle: all but the driver's own calls, on CPU memory, with a driver that keeps its handles in a
table. The driver itself is checked on a GPU by bench/gpu_regression.py."""

import ctypes

import msgspec
import pytest
import torch
from parties import MODEL, Parties, trainer_buffers

from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.plan import make_plan
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports.base import Job, Room, TransferError
from zerokl.weightsync.transports.cuda_driver import CudaDriver
from zerokl.weightsync.transports.cuda_ipc import NONCE_BYTES, CudaIpcSource, CudaIpcTarget, parse_export


class Driver:
    """Shares CPU memory of this process; counts what is open and allocated."""

    device = torch.device("cpu")
    allocations: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self, own=b"A" * 16, reachable=(b"A" * 16, b"B" * 16)):
        self.own, self.reachable, self.opened, self.synchronised = own, reachable, [], 0

    def uuids(self):
        return [self.own, *(uuid for uuid in self.reachable if uuid != self.own)]

    def allocate(self, nbytes):
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.allocations[memory.data_ptr()] = memory
        return memory.data_ptr()

    def free(self, pointer):
        del self.allocations[pointer]

    def export(self, pointer):
        return pointer.to_bytes(8, "little").ljust(64, b"\0")

    def open(self, handle):
        pointer = int.from_bytes(handle, "little")
        if pointer not in self.allocations:
            raise TransferError("open failed: no such allocation")
        self.opened.append(pointer)
        return pointer

    def close(self, pointer):
        self.opened.remove(pointer)

    def size(self, pointer):
        return self.allocations[pointer].numel()

    def view(self, pointer, nbytes):
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), dtype=torch.uint8)

    def synchronise(self):
        self.synchronised += 1


def test_every_rank_gets_every_version_and_nothing_stays_open(tmp_path):
    trainer, rollout = MegatronSizes(tp=2, pp=2, vocabulary_multiple=4), SglangSizes(tp=2, engines=2)
    drivers = [Driver() for _ in range(8)]
    sources = [CudaIpcSource(driver) for driver in drivers[:4]]
    run = Parties(
        tmp_path, sources, [CudaIpcTarget(driver) for driver in drivers[4:]], trainer=trainer, rollout=rollout
    )
    try:
        for version in range(4):
            outcome = run.sync(f"v{version}", seed=version)
            assert outcome.committed, outcome.cause
            assert run.all_hold(version)
        assert outcome.copied_bytes <= 3 * outcome.bytes  # once into the pool, once out of it for each engine
        assert [driver.opened for driver in drivers] == [[]] * 8
        assert all(driver.synchronised >= 4 for driver in drivers)
    finally:
        run.close()
    for source in sources:
        source.close()
    assert Driver.allocations == {}


@pytest.fixture
def transfer():
    """(what the sender announced, a function that receives by an announcement)."""
    plan = make_plan(megatron_layout(MODEL, MegatronSizes()), sglang_layout(MODEL, SglangSizes()))
    job = Job(bytes(16), "v", plan, 0)
    source, driver = CudaIpcSource(Driver()), Driver()
    target = CudaIpcTarget(driver)
    export = parse_export(source.prepare(job, trainer_buffers(MODEL, MegatronSizes(), 0, 1)))
    target.prepare(job, Room(sglang_layout(MODEL, SglangSizes()).ranks[0].buffers))
    yield export, lambda said: target.transfer(job, {"trainer-0": msgspec.msgpack.encode(said)}), driver
    source.close()


FIRST = "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"device": b"C" * 16}, f"trainer-0 is on GPU {(b'C' * 16).hex()}, which cpu cannot reach"),
        ({"handle": bytes(64)}, "no such allocation"),
        ({"nonce": bytes(16)}, "announced another pool than the one that its handle opens"),
        ({"nbytes": 1 << 40}, r"announced 1099511627776 bytes, its pool has \d+"),
        ({"buffers": {}}, "are outside a buffer of 0"),
    ],
)
def test_an_announcement_that_is_not_true_is_refused(transfer, change, cause):
    export, receive, driver = transfer
    assert receive(export).copied_bytes > 0
    with pytest.raises(TransferError, match=cause):
        receive(msgspec.structs.replace(export, **change))
    assert driver.opened == []


@pytest.mark.parametrize("place", [(0, 64), (-512, 64), (512, -1), (512, 1 << 50)])
def test_a_buffer_outside_the_pool_or_over_its_nonce_is_refused(transfer, place):
    export, receive, _ = transfer
    with pytest.raises(TransferError, match="is outside the pool"):
        receive(msgspec.structs.replace(export, buffers=export.buffers | {FIRST: place}))


def test_every_attempt_has_a_nonce_of_its_own():
    plan = make_plan(megatron_layout(MODEL, MegatronSizes()), sglang_layout(MODEL, SglangSizes()))
    job, source = Job(bytes(16), "v", plan, 0), CudaIpcSource(Driver())
    held = trainer_buffers(MODEL, MegatronSizes(), 0, 1)
    first, second = (parse_export(source.prepare(job, held)) for _ in range(2))
    source.close()
    assert first.handle == second.handle  # the pool is kept
    assert first.nbytes == 2 << 20  # and shares no block with other allocations
    assert first.nonce != second.nonce
    assert len(first.nonce) == NONCE_BYTES


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(TransferError, match="the cuda_ipc transport needs"):
        CudaDriver(1 << 10)
