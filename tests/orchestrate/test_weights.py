"""The trainer's side of a run's transfers, against a receiver in this process."""

from types import SimpleNamespace

import pytest
import torch

from zerokl.orchestrate import loop
from zerokl.orchestrate.actors import meeting_of, shares
from zerokl.orchestrate.config import Config
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.trainer import Trainer
from zerokl.orchestrate.weights import Meeting, WeightLink
from zerokl.weightsync.ends import Site, target_ends
from zerokl.weightsync.live_model import named_layout
from zerokl.weightsync.members import WeightReceiver
from zerokl.weightsync.topology import Unfit

TABLES = {
    "model": {"name": "m"}, "data": {"source": "s.s"}, "reward": {"function": "r.r"}, "train": {"steps": 1},
    "weightsync": {"floor_gb_per_s": 1e6},
}  # fmt: skip
WEIGHTS = {"a": torch.arange(4096).bfloat16(), "b": torch.ones(3, 5)}


class Engine:
    """Holds what was installed last."""

    def __init__(self):
        self.held = None

    def pause(self, in_flight):
        self.in_flight = in_flight

    def install(self, version, buffers):
        self.held = version, {name: bytes(buffer) for name, buffer in buffers.items()}

    def restore(self, version, buffers):
        self.held = None if version is None else (version, {name: bytes(x) for name, x in buffers.items()})

    def resume(self, version):
        assert self.held[0] == version


def linked(meeting):
    layout, buffers = named_layout(WEIGHTS)
    engine = Engine()
    engine.ends = target_ends(Site(meeting.folder, meeting.ranks, torch.device("cpu")))
    receiver = WeightReceiver(meeting.address, meeting.token, layout, 0, engine.ends, engine)
    receiver.start()
    return WeightLink(meeting, layout, buffers), receiver, engine


def test_weights_arrive_and_the_report_says_how(tmp_path):
    link, receiver, engine = linked(Meeting.in_folder(tmp_path))
    with link:
        report = link.sync("7", timeout_s=30, in_flight="retract")
    receiver.close()
    assert engine.held == ("7", {name: bytes(x.view(torch.uint8).numpy()) for name, x in WEIGHTS.items()})
    assert engine.in_flight == "retract"
    size = sum(x.nbytes for x in WEIGHTS.values())
    assert (report.version, report.transport, report.bytes, report.copied_by_engines) == ("7", "ipc", size, 0)
    assert report.copied_bytes == size
    assert "by ipc (host memory of one host) at " in str(report)
    assert report.gb_per_s > 0


class Here:
    """An actor's object in this process: ``call.remote(...)`` makes the call when `wait` asks for it."""

    def __init__(self, held):
        self.held = held

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: lambda: getattr(self.held, name)(*arguments))


def test_a_run_whose_transfers_are_below_its_floor_ends_with_the_cause(tmp_path, monkeypatch):
    config = Config.model_validate(TABLES)
    link, receiver, engine = linked(meeting_of(config, tmp_path))
    trainer, notes = Trainer(), []
    trainer.link = link
    actors = SimpleNamespace(
        trainer=Here(trainer), revive=lambda: 0, wait=lambda call, *_: call(),
    )  # fmt: skip
    monkeypatch.setattr(loop, "Actors", lambda *_: actors)
    progress = SimpleNamespace(waiting=None, note=notes.append)
    driver = loop.Driver(SimpleNamespace(config=config), None, None, progress)
    floor = r"weights '0' did not reach the engine: the transport moved .* GB/s, the floor is 1e\+06"
    with link, pytest.raises(RunError, match=floor):
        driver.start(None)
    receiver.close()
    assert [note.endswith("trying again") for note in notes] == [True, True]
    assert engine.held is None


@pytest.mark.parametrize("name", ["disk", "rdma", "collective"])
def test_a_transport_asked_for_by_name_carries_the_weights(name, tmp_path):
    link, receiver, engine = linked(Meeting.in_folder(tmp_path, transport=name))
    with link:
        reports = [link.sync(version, timeout_s=30) for version in ("1", "2")]
    receiver.close()
    assert [(r.transport, r.reason) for r in reports] == [(name, "asked for by name")] * 2
    assert engine.ends.current.name == name
    assert engine.held == ("2", {name: bytes(x.view(torch.uint8).numpy()) for name, x in WEIGHTS.items()})


def test_a_transport_that_cannot_work_here_is_refused_before_anything_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # both say so; the weights are in host memory
    link, receiver, engine = linked(Meeting.in_folder(tmp_path, transport="cuda_ipc"))
    phases = []
    link.watch = phases.append
    with link, pytest.raises(Unfit, match='there are weights in host memory: set transport to "auto" or "ipc"'):
        link.sync("7", timeout_s=30)
    receiver.close()
    assert (engine.held, phases) == (None, [])


@pytest.mark.parametrize(
    ("count", "engines", "sizes"),
    [(12, 1, [12]), (12, 2, [4, 8]), (12, 3, [4, 4, 4]), (8, 3, [0, 4, 4]), (10, 2, [4, 6]), (0, 2, [0, 0])],
)
def test_engines_share_the_prompts_and_no_group_is_torn(count, engines, sizes):
    parts = shares(range(count), engines, 4)
    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == list(range(count))
