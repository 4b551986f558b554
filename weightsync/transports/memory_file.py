"""Memory files: written by the process that made them, a region at a time, and read by others, who can never write.

The kernel keeps the promises. Size and seals are sealed for everybody, and no mapping or descriptor made after the file
itself can write (F_SEAL_FUTURE_WRITE). The maker's own mapping is read-only, too, but for the region being written: a
stray write into a finished version is a fault there, not another weight.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Iterator

import numpy as np
import torch

from zerokl.weightsync.transports.base import TransferError

PAGE = mmap.PAGESIZE
_F_SEAL_FUTURE_WRITE = 0x0010  # <linux/fcntl.h>, since Linux 5.1; Python names it from 3.13 on
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_libc = ctypes.CDLL(None, use_errno=True)


class MemoryFile:
    """A sender's file of ``nbytes``. ``given``: the processes that ever got it."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError if there is not enough memory."""
        self.id, self.nbytes, self.given = secrets.token_bytes(16), nbytes, set[bytes]()
        self.descriptor = os.memfd_create("zerokl-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        close = weakref.finalize(self, os.close, self.descriptor)
        try:
            os.ftruncate(self.descriptor, nbytes)
            os.posix_fallocate(self.descriptor, 0, nbytes)  # full memory: an error here, a signal where it is written
            memory = mmap.mmap(self.descriptor, nbytes)  # before the seal: the only mapping that can ever write
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
        except OSError:
            close()
            raise
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8)

    @contextlib.contextmanager
    def writable(self, offset: int, nbytes: int) -> Iterator[torch.Tensor]:
        """A region, uint8 [nbytes], which nobody can write any more when this ends. ``offset``: at a page's start."""
        self.protect(offset, nbytes, writable=True)
        try:
            yield self.bytes[offset : offset + nbytes]
        finally:
            self.protect(offset, nbytes, writable=False)

    def freeze(self, offset: int, nbytes: int) -> None:
        """Let nobody write these bytes any more, nor what else is in their pages."""
        start = offset // PAGE * PAGE
        self.protect(start, offset + nbytes - start, writable=False)

    def protect(self, offset: int, nbytes: int, *, writable: bool) -> None:
        """Let this process write a region from now on, or nobody. ``offset``: at a page's start."""
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        start = ctypes.c_void_p(self.bytes.data_ptr() + offset)
        if _libc.mprotect(start, ctypes.c_size_t(nbytes), access):  # whole pages; the rest of the last one is padding
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def map_file(descriptor: int, nbytes: int, name: str) -> torch.Tensor:
    """Map somebody's file, uint8 [nbytes], and close its descriptor. Writing there is a fault.

    Raises TransferError unless it has that size, is sealed, and the kernel refuses to ever map it writable.
    """
    try:
        size = os.fstat(descriptor).st_size
        if size != nbytes:
            raise TransferError(f"{name} handed over {size} bytes, the plan has {nbytes}")
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise TransferError(f"{name} handed over memory that others can still change")
        memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise TransferError(f"{name} handed over no memory file: {error}") from error
    finally:
        os.close(descriptor)
    return torch.from_numpy(np.asarray(_Claimed(memory)))


class _Claimed:
    """Read-only memory that says it is writable: torch knows no other. The kernel goes on refusing."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._array = np.frombuffer(memory, dtype=np.uint8)
        found = dict(self._array.__array_interface__)
        self.__array_interface__ = found | {"data": (found["data"][0], False)}
