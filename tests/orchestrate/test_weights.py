"""The trainer's side of a run's transfers, against a receiver in this process."""

import pytest
import torch

from zerokl.orchestrate.weights import Meeting, WeightLink
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.live_model import named_layout
from zerokl.weightsync.members import WeightReceiver
from zerokl.weightsync.transports.ipc import IpcTarget

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
    receiver = WeightReceiver(meeting.address, meeting.token, layout, 0, IpcTarget(), engine)
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
    assert report.gb_per_s > 0


def test_a_transfer_below_the_runs_floor_is_refused(tmp_path):
    link, receiver, engine = linked(Meeting.in_folder(tmp_path, floor_gb_per_s=1e6))
    with link, pytest.raises(WeightSyncError, match=r"weights '7' did not reach the engine: .*the floor is 1e\+06"):
        link.sync("7", timeout_s=30)
    receiver.close()
    assert engine.held is None
