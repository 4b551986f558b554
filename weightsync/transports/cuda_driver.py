"""The few calls of the CUDA driver that sharing device memory between processes takes, by ctypes.

torch's allocator may hand out memory that cannot be shared as a handle (expandable segments), so what is shared is
allocated here. Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from zerokl.weightsync.transports.base import TransferError

HANDLE_BYTES = 64
UUID_BYTES = 16
_LAZY_PEER_ACCESS = 1


class Driver(Protocol):
    """What `cuda_ipc` needs; tests have one on CPU memory. Pointers are plain numbers. Every call raises TransferError
    naming the function that failed."""

    device: torch.device

    def uuids(self) -> list[bytes]:
        """The devices whose memory this process can open, 16 bytes each, its own first."""
        ...

    def allocate(self, nbytes: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def export(self, pointer: int) -> bytes:
        """A handle, 64 bytes, by which other processes of this machine can open the whole allocation."""
        ...

    def open(self, handle: bytes) -> int: ...

    def close(self, pointer: int) -> None: ...

    def size(self, pointer: int) -> int:
        """Bytes of the allocation that begins at a pointer."""
        ...

    def view(self, pointer: int, nbytes: int) -> torch.Tensor:
        """The memory as uint8 [nbytes], without a copy; it must not be used after `free` or `close`."""
        ...

    def synchronise(self) -> None:
        """Wait until all copies queued so far have been made."""
        ...


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * UUID_BYTES)]


class _Memory:
    """Device memory in the form that `torch.as_tensor` takes without copying."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class CudaDriver:
    """The driver of one device, in the context that torch uses too."""

    def __init__(self, index: int = 0) -> None:
        """Raises TransferError if there is no driver or no such device."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransferError(f"the cuda_ipc transport needs NVIDIA's driver: {error}") from error
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            raise TransferError(f"the cuda_ipc transport needs GPU {index}; torch sees {torch.cuda.device_count()}")
        torch.cuda.init()
        self.device = torch.device("cuda", index)
        torch.zeros(1, device=self.device)  # creates the context

    def uuids(self) -> list[bytes]:
        own = self.device.index
        order = [own, *(i for i in range(torch.cuda.device_count()) if i != own)]
        return [self._uuid(i) for i in order if i == own or torch.cuda.can_device_access_peer(own, i)]

    def allocate(self, nbytes: int) -> int:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def export(self, pointer: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)

    def open(self, handle: bytes) -> int:
        given, pointer = _Handle(), ctypes.c_uint64()
        ctypes.memmove(ctypes.addressof(given), handle, HANDLE_BYTES)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return pointer.value

    def close(self, pointer: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def size(self, pointer: int) -> int:
        base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(nbytes), ctypes.c_uint64(pointer))
        return nbytes.value if base.value == pointer else 0

    def view(self, pointer: int, nbytes: int) -> torch.Tensor:
        return torch.as_tensor(_Memory(pointer, nbytes), device=self.device)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def _uuid(self, index: int) -> bytes:
        device, uuid = ctypes.c_int(), _Uuid()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), device)
        return ctypes.string_at(ctypes.addressof(uuid), UUID_BYTES)

    def _call(self, name: str, *arguments: Any) -> None:
        torch.cuda.set_device(self.device)  # any thread may call, and which context is current is a thread's own matter
        error = getattr(self._library, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(error, ctypes.byref(text))
            raise TransferError(f"{name} failed on {self.device}: {(text.value or b'').decode()} ({error})")
