"""Weights from the trainer into the rollout engine, checked byte for byte."""

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.digest import tensor_digest
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.live_model import LiveModel, block_layout, named_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.protocol import Deadlines, Outcome

__all__ = [
    "Deadlines",
    "LiveModel",
    "Outcome",
    "WeightReceiver",
    "WeightSender",
    "WeightSource",
    "WeightSyncError",
    "block_layout",
    "named_layout",
    "tensor_digest",
]
