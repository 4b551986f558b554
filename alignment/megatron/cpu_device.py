"""What rewritten Megatron-Core modules find in place of ``torch.cuda`` on a machine without CUDA.

Streams and events do nothing (CPU work is synchronous), memory statistics are zero, random state is the CPU
generator's. A name that is missing here and is a class in ``torch.cuda`` (``CUDAGraph``, ``OutOfMemoryError``, ...) is
handed through, because naming a class is harmless; any other missing name raises, naming itself.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Stream:
    """A stream that is always idle."""

    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...
    def wait_stream(self, _stream: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    """An event that has already happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...
    def record(self, _stream: Any = None) -> None: ...
    def wait(self, _stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        return 0.0


class nvtx:
    @staticmethod
    def range_push(_message: str) -> None: ...
    @staticmethod
    def range_pop() -> None: ...
    @staticmethod
    def range(*_args: Any, **_kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class random:
    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:  # noqa: ARG004  (torch's signature)
        return torch.get_rng_state()


FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
amp = torch.amp
_IDLE = Stream()


def current_device() -> torch.device:
    return torch.device("cpu")


def set_device(_device: Any) -> None: ...


def is_available() -> bool:
    return False


def is_initialized() -> bool:
    return False


def is_current_stream_capturing() -> bool:
    return False


def device_count() -> int:
    return 1


def get_device_capability(*_args: Any) -> tuple[int, int]:
    return (0, 0)


def synchronize(*_args: Any) -> None: ...


def empty_cache() -> None: ...


def current_stream(*_args: Any) -> Stream:
    return _IDLE


default_stream = current_stream


def set_stream(_stream: Any) -> None: ...


def stream(_stream: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def get_rng_state(*_args: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_args: Any) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


manual_seed_all = manual_seed


def memory_allocated(*_args: Any) -> int:
    return 0


memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated


def memory_stats(*_args: Any) -> dict[str, int]:
    return {}


def mem_get_info(*_args: Any) -> tuple[int, int]:
    return (0, 0)


def __getattr__(name: str) -> Any:
    value = getattr(torch.cuda, name, None)
    if isinstance(value, type):
        return value
    raise AttributeError(
        f"Megatron-Core asked for torch.cuda.{name}, which has no CPU stand-in. "
        f"Switch off the Megatron feature that needs it, or add {name} to alignment/megatron/cpu_device.py."
    )
