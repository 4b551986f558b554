"""A sender whose own buffers lie in the files that receivers map: no copy where layouts agree; what is served stays."""

import os
import signal

import pytest
import torch
from parties import MODEL, ONE, ONE_ENGINE, Parties, engine_buffers, trainer_buffers, write

from zerokl.weightsync.ends import Ends
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.plan import Copy
from zerokl.weightsync.sglang_layout import SglangSizes
from zerokl.weightsync.transports.base import TransferError
from zerokl.weightsync.transports.ipc import IpcSource, IpcTarget
from zerokl.weightsync.transports.ipc_layout import Own

TWO = SglangSizes(engines=2)
SIZE = sum(tensor.nbytes for tensor in MODEL.tensors().values())
# what Megatron and SGLang lay out differently: queries, keys and values; and the embedding, which SGLang pads here
OTHERWISE = ("q_proj", "k_proj", "v_proj", "embed_tokens")
REARRANGED = sum(t.nbytes for name, t in MODEL.tensors().items() if any(part in name for part in OTHERWISE))


class Run(Parties):
    """One that writes each version where the source says."""

    def write(self, seed):
        for rank, source in enumerate(self.sources):
            write(source, trainer_buffers(self.model, self.trainer, rank, seed))

    def update(self, version, seed):
        self.write(seed)
        return self.sender.sync(version)


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path, [IpcSource(tmp_path)], [IpcTarget(), IpcTarget()], rollout=TWO)
    assert found.sources[0].renew() is None  # nothing was sent: sizes and receivers are not known
    assert found.sync("v1", seed=1).copied_bytes == SIZE
    yield found
    found.close()


def lost(run, seed):
    """Whether what an engine's process maps, and nobody hears of any more, is still that version."""
    held = dict(run.engines[1].buffers)
    expected = engine_buffers(MODEL, ONE_ENGINE, 0, seed)
    return lambda: all(torch.equal(held[name], torch.from_numpy(values)) for name, values in expected.items())


def test_only_what_is_laid_out_differently_is_copied(run):
    assert 0 < REARRANGED < SIZE
    places = set()
    for number in range(2, 7):
        run.write(number)
        assert run.all_hold(number - 1)  # written elsewhere
        outcome = run.sender.sync(f"v{number}")
        assert outcome.committed, outcome.cause
        assert (outcome.copied_bytes, outcome.copied_by_engines) == (REARRANGED, 0)
        assert run.serving() == [f"v{number}"] * 2
        assert run.all_hold(number)
        places.add(run.sources[0].buffers["decoder.final_layernorm.weight"].data_ptr())
    assert len(places) == 2  # two files take turns
    assert len(run.sources[0]._transport._files) == 2


def test_sent_again_nothing_is_written(run):
    assert run.update("v2", seed=2).committed
    run.receivers[1]._ends = Ends.only(IpcTarget())  # another engine, which has nothing yet
    outcome = run.sender.sync("v2 again")
    assert outcome.committed, outcome.cause
    assert outcome.copied_bytes == 0
    assert run.all_hold(2)
    assert run.update("v3", seed=3).committed
    assert run.all_hold(3)


@pytest.mark.parametrize("step", ["sent", "not sent"])
def test_who_writes_into_what_was_sent_dies(run, step):
    memory = run.sources[0].renew()["decoder.final_layernorm.weight"]
    if step == "sent":
        assert run.sender.sync("v2").committed
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        memory[0] = 1
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (step == "sent")
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGSEGV


def test_after_a_failure_the_version_before_stays_and_other_memory_is_used(run):
    assert run.update("v2", seed=2).committed
    install, run.engines[1].install = run.engines[1].install, lambda *_: 1 / 0
    outcome = run.update("v3", seed=3)
    assert not outcome.committed
    assert run.all_hold(2)
    run.engines[1].install = install
    tried = run.sources[0].buffers["decoder.final_layernorm.weight"].data_ptr()
    assert run.sender.sync("v3 again").committed  # from where it lies
    assert run.all_hold(3)
    run.engines[1].install = lambda *_: 1 / 0
    assert not run.update("v4", seed=4).committed
    run.engines[1].install = install
    run.write(5)
    assert run.all_hold(3)
    assert tried != run.sources[0].buffers["decoder.final_layernorm.weight"].data_ptr()
    assert run.sender.sync("v5").committed
    assert run.all_hold(5)
    assert len(run.sources[0]._transport._files) == 2


def test_what_a_replaced_engine_maps_is_never_written_again(run):
    assert run.update("v2", seed=2).committed
    intact = lost(run, 2)
    run.receivers[1]._ends = Ends.only(IpcTarget())
    for number in range(3, 7):
        assert run.update(f"v{number}", seed=number).committed
        assert run.all_hold(number)
        assert intact()


def test_other_memory_of_the_sender_is_copied_as_before(run):
    assert run.update("v2", seed=2).committed
    outcome = run.sync("v3", seed=3)  # `load` gives the source buffers of its own
    assert outcome.committed, outcome.cause
    assert outcome.copied_bytes == SIZE
    assert run.all_hold(3)
    assert run.update("v4", seed=4).copied_bytes == REARRANGED
    assert run.all_hold(4)


def test_files_made_for_other_receivers_are_left_and_copied_from(run):
    assert run.update("v2", seed=2).committed
    run.write(3)
    transport = run.sources[0]._transport
    mine = transport._mine
    transport._mine = mine._replace(own=Own(mine.own.buffers, mine.own.nbytes + (1 << 20)))  # as if sizes had changed
    outcome = run.sender.sync("v3")
    assert not outcome.committed
    assert "bytes now, the file made for them has" in outcome.cause
    assert mine.file not in transport._files  # its weights lie there, and nowhere else
    assert run.all_hold(2)
    outcome = run.sender.sync("v3 again")
    assert (outcome.committed, outcome.copied_bytes) == (True, SIZE), outcome.cause
    assert run.all_hold(3)


def test_no_memory_is_an_error(run, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.sources[0]._transport, "new_file", full)
    with pytest.raises(TransferError, match=r"cannot export .* No space left"):
        run.sources[0].renew()


def test_two_senders_share_what_lies_whole_with_one_of_them(tmp_path):
    sizes = ONE.__class__(tp=2, vocabulary_multiple=4)
    run = Run(tmp_path, [IpcSource(tmp_path) for _ in range(2)], [IpcTarget(), IpcTarget()],
              trainer=sizes, rollout=SglangSizes(tp=2))  # fmt: skip
    try:
        first = run.sync("v1", seed=1)
        assert first.committed, first.cause
        second = run.update("v2", seed=2)
        assert second.committed, second.cause
        assert run.all_hold(2)
        assert second.copied_bytes < first.copied_bytes
    finally:
        run.close()


def copy(*, source=0, target=0, rows=2, pitch=64, wide=64, buffer="b"):
    return Copy("w", buffer, source, pitch, "t", target, 64, rows, wide)


OWN = Own({"b": (4096, 256), "c": (8192, 256)}, 12288)


@pytest.mark.parametrize(
    ("parts", "size", "start"),
    [
        ([copy()], 128, 4096),
        ([copy(source=64, target=0)], 128, 4160),
        ([copy(), copy(source=128, target=128)], 256, 4096),
        ([copy(), copy(source=128, target=128, buffer="c")], 256, None),  # of two buffers
        ([copy(), copy(source=192, target=128, rows=1)], 192, None),  # not in one run
        ([copy()], 192, None),  # the rest would be somebody else's
        ([copy(pitch=128)], 128, None),  # rows that lie apart
        ([copy(rows=1, pitch=128)], 64, 4096),  # one row has no pitch
        ([copy(source=32)], 128, None),  # aligned for no kernel
        ([copy(source=192)], 128, None),  # beyond the buffer
        ([copy(buffer="absent")], 128, None),
    ],
)
def test_a_buffer_is_there_only_if_every_byte_of_it_is(parts, size, start):
    assert OWN.start(tuple(parts), size) == start


def test_a_buffer_beyond_the_announced_memory_is_not_there():
    assert Own({"b": (4096, 256)}, 4096).start((copy(),), 128) is None


def test_renew_during_a_transfer_is_refused(run):
    source = run.sources[0]
    source._observe = lambda step: step == "transfer" and errors.append(refusal(source))
    errors: list[str] = []
    assert run.update("v2", seed=2).committed
    assert errors == ["waited 0 s for trainer-0 to end sending 'v2'"]


def refusal(source):
    with pytest.raises(WeightSyncError) as error:
        source.renew(timeout_s=0)
    return str(error.value)
