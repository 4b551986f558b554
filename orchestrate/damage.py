"""A sending end that damages one transfer, on demand: for the fault runs of `zerokl verify --syncs` and for tests."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from zerokl.weightsync.plan import Copy
from zerokl.weightsync.transports.base import Job, TransferError
from zerokl.weightsync.transports.copies import view
from zerokl.weightsync.transports.ipc import IpcSource
from zerokl.weightsync.transports.ipc_layout import Region, arrange, placed
from zerokl.weightsync.transports.memory_file import MemoryFile

Damage = Literal["flipped bit", "missing chunk", "source error", "full memory"]
DAMAGES: tuple[Damage, ...] = ("flipped bit", "missing chunk", "source error", "full memory")
_LITTLE = 4 << 10


class DamagingSource(IpcSource):
    """``plan(damage, where)`` arms it for the next transfer; ``witness`` then says what was done.

    flipped bit: one bit of the exported file is another one than in the trainer's memory. missing chunk: one copy is
    left out. source error: the sender fails while it sends. full memory: the kernel refuses to let a new file grow.
    Nothing is done to what the trainer and the engine share: there is no other copy that it could differ from.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._armed: Damage | None = None
        self._where = 0
        self._victim: tuple[Damage, Region, Copy] | None = None
        self.witness = ""

    def plan(self, damage: Damage, where: int) -> None:
        """Damage the next transfer; ``where`` picks the copy (counted through, modulo their number)."""
        self._armed, self._where, self.witness = damage, where, ""
        if damage == "full memory" and self._mine is not None:
            self._leave(self._mine.file)  # it would not have to grow

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        if self._armed == "source error":
            self._armed, self.witness = None, "raised before the first byte"
            raise TransferError("planted: the trainer cannot read its weights")
        if self._armed == "full memory":
            self._files = []  # an earlier one would not have to grow
        elif self._armed is not None:
            regions = arrange(job.plan, job.rank, endpoints).regions.values()
            written = [region for region in dict.fromkeys(regions) if not region.there]
            everything = [(region, copy) for region in written for copy in region.copies]
            self._victim = self._armed, *everything[self._where % len(everything)]
            self._armed = None
        return super().transfer(job, endpoints)

    def new_file(self, nbytes: int) -> MemoryFile:
        if self._armed != "full memory":
            return super().new_file(nbytes)
        self._armed = None
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LITTLE, before[1]))  # no file of this process may be larger
        try:
            return super().new_file(nbytes)
        except OSError as error:
            self.witness = f"the kernel: {error.strerror}"
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def fill(self, memory: torch.Tensor, region: Region) -> dict[Copy, bytes]:
        digests = super().fill(memory, region)
        if self._victim is None or self._victim[1] != region:
            return digests
        damage, _, victim = self._victim
        self._victim = None
        ((offset, pitch),) = [place for copy, *place in placed(region) if copy == victim]
        target = view(memory, offset, pitch, victim)
        if damage == "flipped bit":
            target[0, 0] ^= 1
            self.witness = f"bit 0 of {victim.tensor}"
        else:
            target[:] = 0
            self.witness = f"{victim.nbytes} bytes of {victim.tensor}"
        return digests
