"""Moving a trainer's weights into a running engine: `push`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from zerokl.weightsync.digest import combined
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.shared import publish


class Engine(Protocol):
    """What `push` needs of a rollout engine."""

    def load_weights(self, manifest: str, *, version: str, timeout_s: float) -> dict[str, str]:
        """Load the shared weights of a manifest (JSON), inside the engine's update window; flush what was cached
        under the old ones and record the version. Returns the digests of the live parameters, by Hugging Face name;
        raises if any step was refused."""
        ...


@dataclass(frozen=True)
class SyncReport:
    """One completed transfer: ``digest`` is over all tensors, equal on both sides."""

    version: str
    bytes: int
    seconds: float
    digest: str


def push(
    named_tensors: Iterable[tuple[str, torch.Tensor]], engine: Engine, *, version: str, timeout_s: float
) -> SyncReport:
    """Publish the tensors (Hugging Face names), have the engine load them, and compare both sides' digests.

    The shared memory is gone when this returns or raises. Raises WeightSyncError if the engine refused the weights or
    holds others than were sent, TimeoutError if it did not answer in time.
    """
    start = time.monotonic()
    with publish(named_tensors, version=version) as manifest:
        try:
            live = engine.load_weights(manifest.to_json(), version=version, timeout_s=timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(f"weights {version!r} were not loaded: {error}") from error
        compare(manifest.digests, live)
        size = sum(entry.nbytes for entry in manifest.tensors)
    return SyncReport(version, size, time.monotonic() - start, combined(live))


def compare(sent: dict[str, str], live: dict[str, str]) -> None:
    """Raise WeightSyncError, naming the first tensor, unless both sides hold the same tensors with the same bytes."""
    for name in sorted(sent.keys() | live.keys()):
        if sent.get(name) != live.get(name):
            raise WeightSyncError(
                f"tensor {name!r} differs after the sync: sender {sent.get(name, 'absent')}, "
                f"engine {live.get(name, 'absent')}"
            )
