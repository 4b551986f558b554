"""Weights from the trainer into the rollout engine, checked byte for byte."""

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.digest import combined, tensor_digest
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.push import Engine, SyncReport, push
from zerokl.weightsync.shared import Manifest, TensorEntry, open_shared, publish

__all__ = [
    "Engine",
    "Manifest",
    "SyncReport",
    "TensorEntry",
    "WeightReceiver",
    "WeightSender",
    "WeightSource",
    "WeightSyncError",
    "combined",
    "open_shared",
    "publish",
    "push",
    "tensor_digest",
]
