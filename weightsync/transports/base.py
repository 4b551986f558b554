"""What every transport offers, and what the protocol gives it to work with."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.plan import Batch, Copy, Plan

Buffers = Mapping[str, torch.Tensor]
"""Buffer name -> its bytes, a contiguous uint8 tensor [n]."""


class TransferError(WeightSyncError):
    """A transport could not move the bytes. The message names the peer and the cause."""


class Cancelled(TransferError):
    """The transfer was called off while it ran."""


@dataclass
class Job:
    """One attempt, as one rank sees it. Everything that waits calls `check`, and so ends with its attempt."""

    attempt: bytes
    version: str
    plan: Plan
    rank: int
    base: str | None = None
    """The version a receiver holds now, if any."""
    deadline: float = float("inf")
    cancelled: threading.Event = field(default_factory=threading.Event)
    digests: dict[Copy, bytes] = field(default_factory=dict)
    """xxh3_128 of what a copy read, for those copies that the sending end digested while it had the bytes in cache."""

    def check(self, waiting_for: str) -> None:
        """Raise Cancelled if the attempt was aborted, TransferError, saying for what, past its deadline."""
        if self.cancelled.is_set():
            raise Cancelled(f"called off while waiting for {waiting_for}")
        if time.monotonic() > self.deadline:
            raise TransferError(f"gave up waiting for {waiting_for}")

    def sent(self) -> list[Batch]:
        """The batches this rank sends."""
        return [batch for batch in self.plan.batches if batch.source == self.rank]

    def received(self) -> list[Batch]:
        """The batches this rank receives."""
        return [batch for batch in self.plan.batches if batch.target == self.rank]


@dataclass(frozen=True)
class Arrived:
    """The receiver's buffers of the new version, and how many bytes were copied to get them. ``digests``: xxh3_128 of
    what a copy has written, for those copies that were digested as they arrived, into memory that cannot change."""

    buffers: Buffers
    copied_bytes: int
    digests: Mapping[Copy, bytes] = field(default_factory=dict)


class Room:
    """Memory for the version that is not live: two buffers of each name that take turns, allocated when asked for.

    With ``in_place`` there is no such memory: the room is the live buffers themselves.
    """

    def __init__(
        self, sizes: Mapping[str, int], in_place: Buffers | None = None, device: torch.device | None = None
    ) -> None:
        self.sizes, self._device = dict(sizes), device or torch.device("cpu")
        self.live: Buffers = in_place or {}
        self.in_place = in_place is not None
        self._slots: dict[str, list[torch.Tensor]] = {}

    def get(self, name: str) -> torch.Tensor:
        """The buffer to write the new version's bytes to; the same one until ``live`` changes."""
        if self.in_place:
            return self.live[name]
        slots = self._slots.setdefault(name, [])
        live = self.live.get(name)
        for slot in slots:
            if live is None or slot.data_ptr() != live.data_ptr():
                return slot
        slots.append(torch.zeros(self.sizes[name], dtype=torch.uint8, device=self._device))
        return slots[-1]

    def on(self, device: torch.device, before: Room | None) -> Room:
        """The same room in a device's memory: what this returned ``before``, or a new one. In place it is this one."""
        if self.in_place:
            return self
        room = before if before is not None and before.sizes == self.sizes else Room(self.sizes, device=device)
        room.live = self.live
        return room

    def all(self) -> dict[str, torch.Tensor]:
        """Every buffer."""
        return {name: self.get(name) for name in self.sizes}


class Source(Protocol):
    """A sending rank's end."""

    name: str

    def prepare(self, job: Job, buffers: Buffers) -> bytes:
        """Get ready to send the buffers; returns what the receivers need to know (a capability)."""
        ...

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        """Send; returns how many bytes were copied here. ``endpoints`` by participant name."""
        ...

    def finish(self) -> None:
        """The attempt is over, one way or the other: let go of everything. Called in any state."""
        ...


@runtime_checkable
class Sharing(Source, Protocol):
    """One whose receivers can read what lies in memory of its own, without a copy."""

    def next_buffers(self, *, committed: bool) -> Buffers | None:
        """Memory for the next version, of the sizes of the buffers sent last; None before anything was. ``committed``:
        whether the last transfer was."""
        ...


class Target(Protocol):
    """A receiving rank's end."""

    name: str

    def prepare(self, job: Job, room: Room) -> bytes:
        """Get ready to receive into ``room``; returns what the senders need to know (a capability)."""
        ...

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:
        """Receive everything this rank needs."""
        ...

    def finish(self) -> None:
        """The attempt is over, one way or the other; called in any state. Buffers that became live stay valid."""
        ...
