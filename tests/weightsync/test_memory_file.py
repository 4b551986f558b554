"""The memory files of `ipc`: who can write when, and when one is written again."""

import ctypes
import faulthandler
import fcntl
import mmap
import os
import re
import signal

import msgspec
import numpy as np
import pytest
import torch
from parties import MODEL, ONE_ENGINE, Parties, engine_buffers
from test_link_faults import Stale

from zerokl.orchestrate.damage import DamagingSource
from zerokl.weightsync.ends import Ends
from zerokl.weightsync.plan import Copy
from zerokl.weightsync.sglang_layout import SglangSizes
from zerokl.weightsync.transports import ipc
from zerokl.weightsync.transports.base import TransferError
from zerokl.weightsync.transports.copies import bytes_at, target_digests
from zerokl.weightsync.transports.ipc_layout import Holding, receivers
from zerokl.weightsync.transports.memory_file import PAGE, SEALS, MemoryFile, map_file

TWO_ENGINES = SglangSizes(engines=2)


def dies_of(action) -> int:
    """The signal that ends a process which does this; 0 for none."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.fixture
def file():
    made = MemoryFile(3 * PAGE)
    with made.writable(0, 2 * PAGE) as memory:
        memory[:] = 7
    return made


def test_a_finished_region_cannot_be_written_by_its_own_maker(file):
    assert dies_of(lambda: file.bytes[PAGE].fill_(1)) == signal.SIGSEGV
    assert dies_of(lambda: file.bytes[2 * PAGE].fill_(1)) == 0  # not finished yet
    with file.writable(PAGE, PAGE) as memory:
        memory[0] = 8
        assert dies_of(lambda: file.bytes[0].fill_(1)) == signal.SIGSEGV
    assert dies_of(lambda: file.bytes[PAGE].fill_(1)) == signal.SIGSEGV
    assert file.bytes[: PAGE + 2].tolist() == [7] * PAGE + [8, 7]


def test_who_got_a_file_can_never_write_to_it(file):
    mapped = map_file(os.dup(file.descriptor), file.nbytes, "t")
    assert dies_of(lambda: mapped[0].fill_(1)) == signal.SIGSEGV
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE)
    for write in (
        lambda: mmap.mmap(file.descriptor, file.nbytes),
        lambda: os.pwrite(file.descriptor, b"x", 0),
        lambda: os.ftruncate(file.descriptor, 0),
        lambda: fcntl.fcntl(file.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(PermissionError):
            write()
    with file.writable(0, PAGE) as memory:
        memory[0] = 9
    assert mapped[0] == 9  # it is the same memory


def test_memory_that_could_still_change_or_has_another_size_is_refused():
    def memory_file(seals):
        descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, PAGE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return descriptor

    assert map_file(memory_file(SEALS), PAGE, "t").numel() == PAGE
    for missing in (SEALS, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SEAL, 0x10):
        with pytest.raises(TransferError, match="that others can still change"):
            map_file(memory_file(SEALS & ~missing), PAGE, "t")
    with pytest.raises(TransferError, match=f"handed over {PAGE} bytes, the plan has {2 * PAGE}"):
        map_file(memory_file(SEALS), 2 * PAGE, "t")


A, B, C = (bytes([number]) * 16 for number in range(3))


def holding(process, *held):
    return Holding(bytes(16), process, {}, held)


def test_a_file_is_written_again_only_when_everyone_who_got_it_says_it_is_free(tmp_path):
    source = ipc.IpcSource(tmp_path)

    def file(nbytes, *said):
        return source._file(nbytes, {f"rollout-{i}": holding(*what) for i, what in enumerate(said)})

    first = file(PAGE, (A,), (B,))
    assert file(PAGE, (A,), (B,)) is first  # an attempt that failed: nobody's live version
    second = file(PAGE, (A, first.id), (B,))
    assert second is not first  # one of them serves from it
    third = file(PAGE, (A, first.id), (B, second.id))
    assert third not in (first, second)
    assert file(PAGE, (A, third.id), (B, third.id)) in (first, second)
    assert len(source._files) == 2
    fourth = file(PAGE, (A, third.id), (C,))  # B is gone, or still serves: who knows
    assert fourth not in (first, second, third)
    assert file(PAGE, (A,), (C,)) is fourth
    larger = file(2 * PAGE, (A,), (C,))
    assert (larger.nbytes, source._files) == (2 * PAGE, [larger])


def test_an_announcement_of_another_attempt_is_refused():
    said = {"rollout-1": msgspec.msgpack.encode(holding(A))}
    assert list(receivers(said, bytes(16))) == ["rollout-1"]
    with pytest.raises(TransferError, match="rollout-1 announced what it holds in another attempt"):
        receivers(said, B)


@pytest.fixture
def start(tmp_path):
    running = []

    def make(wrap=lambda end: end):
        targets = [wrap(ipc.IpcTarget()), ipc.IpcTarget()]
        running.append(Parties(tmp_path, [ipc.IpcSource(tmp_path)], targets, rollout=TWO_ENGINES))
        return running[-1]

    yield make
    for run in running:
        run.close()


def place(run, engine=0):
    return run.engines[engine].buffers["model.norm.weight"].data_ptr()


class Checked:
    """A receiving end whose digests are computed once more when everything has arrived."""

    def __init__(self, inner):
        self.inner, self.name, self.checked = inner, inner.name, 0
        self.prepare, self.finish = inner.prepare, inner.finish

    def transfer(self, job, endpoints):
        arrived = self.inner.transfer(job, endpoints)
        copies = [copy for batch in job.received() for copy in batch.copies]
        assert [arrived.digests[copy] for copy in copies] == list(target_digests(arrived.buffers, job.received(), {}))
        self.checked += 1
        return arrived


def test_two_files_take_turns(start):
    run, places = start(Checked), []
    for version in range(5):
        assert run.sync(f"v{version}", seed=version).committed
        assert run.all_hold(version)
        places.append(place(run))
    assert places[0] != places[1]
    assert places == [places[0], places[1]] * 2 + [places[0]]
    assert run.receivers[0]._transport.checked == 5
    run.sources[0]._transport._files = []  # as after a restart of the trainer
    for version in range(5, 8):
        assert run.sync(f"v{version}", seed=version).committed
        assert run.all_hold(version)
    assert len(run.receivers[0]._transport.inner._mapped) == 2  # the old files are let go


def test_an_engine_that_was_replaced_keeps_its_bytes_for_ever(start):
    run = start()
    for version in range(2):
        assert run.sync(f"v{version}", seed=version).committed
    lost = dict(run.engines[1].buffers)  # as of a process that is stopped or cut off, and goes on serving
    run.receivers[1]._ends = Ends.only(ipc.IpcTarget())
    for version in range(2, 6):
        assert run.sync(f"v{version}", seed=version).committed
        assert run.all_hold(version)
        for name, expected in engine_buffers(MODEL, ONE_ENGINE, 0, 1).items():
            assert torch.equal(lost[name], torch.from_numpy(expected))


def test_what_a_receiver_held_in_another_attempt_counts_for_nothing(start):
    run = start(Stale)
    assert run.sync("v1", seed=1).committed
    run.receivers[0]._transport.armed = True
    outcome = run.sync("v2", seed=2)
    assert run.receivers[0]._transport.fired == 1
    assert (outcome.committed, outcome.failed_in) == (False, "transfer")
    assert run.serving() == ["v1", "v1"]
    assert run.all_hold(1)
    assert run.sync("v3", seed=3).committed


@pytest.mark.parametrize(("offset", "pitch", "rows"), [(-1, 4, 1), (61, 4, 1), (0, 31, 3), (50, 4, 4)])
def test_a_copy_outside_of_its_memory_is_refused(offset, pitch, rows):
    copy = Copy("w", "b", 0, 4, "b", 0, 4, rows, 4)
    memory = np.arange(64, dtype=np.uint8)
    assert bytes_at(memory, 8, 12, copy).tolist() == [[8 + 12 * row + i for i in range(4)] for row in range(rows)]
    with pytest.raises(TransferError, match=r"'w' at .* is outside of 64 bytes"):
        bytes_at(memory, offset, pitch, copy)


@pytest.mark.parametrize(
    ("damage", "cause", "witness"),
    [
        ("flipped bit", r"rollout-\d: tensor '(.*?)' from trainer-0", r"bit 0 of (.*)"),
        ("missing chunk", r"rollout-\d: tensor '(.*?)' from trainer-0", r"\d+ bytes of (.*)"),
        ("source error", "planted: (the trainer cannot read its weights)", "raised before the first byte"),
        ("full memory", r"cannot export \d+ bytes of weights: ([^;]*)", "the kernel: (.*)"),
    ],
)
def test_every_damage_that_can_be_planted_is_found(tmp_path, damage, cause, witness):
    source = DamagingSource(tmp_path)
    run = Parties(tmp_path, [source], [ipc.IpcTarget(), ipc.IpcTarget()], rollout=TWO_ENGINES)
    try:
        for version in range(2):
            assert run.sync(f"v{version}", seed=version).committed
        source.plan(damage, 12345)
        outcome = run.sync("bad", seed=9)
        assert not outcome.committed
        found, seen = re.search(cause, outcome.cause), re.fullmatch(witness, source.witness)
        assert seen, source.witness
        broke_off = outcome.failed_in == "transfer" and "trainer-0 does not hand over" in outcome.cause
        assert found or broke_off, outcome.cause  # whoever is heard first
        assert not found or seen.groups() in ((), found.groups())
        assert run.serving() == ["v1", "v1"]
        assert run.all_hold(1)
        assert run.sync("v2", seed=2).committed
        assert run.all_hold(2)
    finally:
        run.close()
