"""A sending end that damages one transfer, on demand: for the fault runs of `zerokl verify --syncs` and for tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from zerokl.weightsync.transports.base import Job, TransferError
from zerokl.weightsync.transports.ipc import IpcSource, Region, placed

Damage = Literal["flipped bit", "missing chunk", "source error", "full memory"]
DAMAGES: tuple[Damage, ...] = ("flipped bit", "missing chunk", "source error", "full memory")
_LITTLE = 64 << 10


class DamagingSource(IpcSource):
    """``plan(damage, where)`` arms it for the next transfer; ``witness`` then says what was done.

    flipped bit: one bit of the exported file is another one than in the trainer's memory. missing chunk: one copy is
    left out. source error: the sender fails while it sends. full memory: the kernel refuses to let the file grow.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._armed: Damage | None = None
        self._where = 0
        self.witness = ""

    def plan(self, damage: Damage, where: int) -> None:
        """Damage the next transfer; ``where`` picks the copy (counted through, modulo their number)."""
        self._armed, self._where, self.witness = damage, where, ""

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        if self._armed == "source error":
            self._armed, self.witness = None, "raised before the first byte"
            raise TransferError("planted: the trainer cannot read its weights")
        return super().transfer(job, endpoints)

    def fill(self, file: int, regions: Sequence[Region]) -> None:
        armed, self._armed = self._armed, None
        if armed == "full memory":
            self._fill_little(file, regions)
            return
        super().fill(file, regions)
        if armed is None:
            return
        everything = [(region, *place) for region in regions for place in placed(region)]
        region, copy, offset, _ = everything[self._where % len(everything)]
        start = region.offset + offset
        if armed == "flipped bit":
            (byte,) = os.pread(file, 1, start)
            os.pwrite(file, bytes([byte ^ 1]), start)
            self.witness = f"bit 0 of {copy.tensor}"
        else:
            os.pwrite(file, bytes(copy.nbytes), start)
            self.witness = f"{copy.nbytes} bytes of {copy.tensor}"

    def _fill_little(self, file: int, regions: Sequence[Region]) -> None:
        """Let no file of this process grow beyond a little while the export is written."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LITTLE, before[1]))
        try:
            super().fill(file, regions)
        except OSError as error:
            self.witness = f"the kernel: {error.strerror}"
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
