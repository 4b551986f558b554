"""What every op needs: the loaded library, argument checks, and the way weight gradients leave."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

_NAMESPACE = "zerokl::"
_LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"


def load_library() -> tuple[SimpleNamespace, tuple[str, ...]]:
    """The operators by name, and the device types they run on. Raises ImportError if they were not built.

    Resolving the overloads once saves half of a call's overhead. Every op writes into tensors it is given, so its fake
    (what torch.compile traces) does nothing.
    """
    if not _LIBRARY.exists():
        raise ImportError(
            "zerokl's compiled operators are missing; build them with `make install` (or `pip install -e .`)"
        )
    torch.ops.load_library(str(_LIBRARY))
    names = [n.removeprefix(_NAMESPACE) for n in torch._C._dispatch_get_all_op_names() if n.startswith(_NAMESPACE)]
    for name in names:
        if name != "set_isa":  # a test hook that takes no tensor
            torch.library.register_fake(_NAMESPACE + name, lambda *_: None)
    operators = SimpleNamespace(**{name: getattr(torch.ops.zerokl, name).default for name in names})
    if not (torch.cuda.is_available() and find_spec("triton")):
        return operators, ("cpu",)
    from ..triton import register

    register()
    return operators, ("cpu", "cuda")


ops: Any
ops, DEVICES = load_library()


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must see this call; otherwise ops skip its bookkeeping (same bits, R0)."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def fail(op: str, message: str) -> NoReturn:
    """Raise ValueError naming the op (R10)."""
    raise ValueError(f"zerokl.kernels.{op}: {message}")


def check(condition: bool, op: str, message: str | Callable[[], str]) -> None:
    """`fail` unless the condition holds. A function as message is called only then: texts cost more than checks."""
    if not condition:
        fail(op, message if isinstance(message, str) else message())


def check_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Every given tensor is on one device, and this process has kernels for it."""
    device = None
    for name, t in tensors.items():
        if t is None or t.device == device:
            continue
        if device is not None:
            fail(op, f"{name} is on {t.device}, other arguments on {device}; move them to one device")
        device = t.device
        if device.type not in DEVICES:
            supported = ", ".join(DEVICES)
            fail(op, f"{name} is on {device}; supported: {supported} (cuda needs a GPU that torch sees and triton)")


def check_bf16(op: str, **tensors: torch.Tensor | None) -> None:
    """Every given tensor is bf16, all on one supported device."""
    on_cpu = True
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype is not torch.bfloat16:
            fail(op, f"{name} is {t.dtype}; supported: torch.bfloat16")
        on_cpu = on_cpu and t.is_cpu
    if not on_cpu:  # comparing devices costs microseconds, as much as a norm of one row
        check_device(op, **tensors)


def check_segments(op: str, segments: int, depth: int) -> None:
    """R2: a power of two that cuts the depth into equal parts of whole pairs."""
    if segments < 1 or segments & (segments - 1) or (segments > 1 and depth % (2 * segments)):
        fail(op, f"segments={segments} must be a power of two that cuts K={depth} into even parts")


def per_row(
    value: torch.Tensor | float, rows: int, dtype: torch.dtype, device: torch.device, op: str, name: str
) -> torch.Tensor:
    """A scalar or [rows] tensor as a contiguous [rows] tensor of dtype on device."""
    if isinstance(value, torch.Tensor):
        check(value.shape == (rows,), op, f"{name} has shape {tuple(value.shape)}; expected ({rows},)")
        return value.to(device, dtype).contiguous()
    return torch.full((rows,), value, dtype=dtype, device=device)


class WeightGrad:
    """Where a weight's gradient goes (R9: tokens added in packed order into fp32).

    With a ``main_grad`` (fp32) on the weight, chains continue from it in place and Megatron's fused protocol is
    followed: ``grad_added_to_main_grad`` is set and a placeholder is returned. Otherwise the chains start at +0 and the
    sum is rounded once to the weight's dtype.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        main = getattr(weight, "main_grad", None)
        if main is not None and (main.dtype != torch.float32 or main.shape != weight.shape or not main.is_contiguous()):
            raise ValueError(
                f"zerokl.kernels: main_grad must be a contiguous fp32 tensor of shape {tuple(weight.shape)}"
            )
        self._weight = weight
        self._fused = main is not None
        self.buffer: torch.Tensor = (
            main if main is not None else torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        )

    def result(self) -> torch.Tensor:
        """What autograd gets."""
        if not self._fused:
            return self.buffer.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # one element, expanded: autograd needs the shape, nobody reads the values
        return torch.zeros(1, dtype=self._weight.dtype, device=self._weight.device).expand(self._weight.shape)
