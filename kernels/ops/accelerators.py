"""Optional accelerators: other libraries' kernels where they are byte-equal to ours on this machine's GPU."""

from __future__ import annotations

from typing import Any

import torch

from ._common import DEVICES

_verdicts: list[Any] = []


def accelerate() -> tuple[Any, ...]:
    """Judge DeepGEMM and FlashAttention on the current GPU and use what is byte-equal; a verdict for each candidate.

    Takes seconds (the libraries compile their kernels). Without this call none is used. Bits are the same with and
    without; a machine without a GPU gets no verdicts. See ``kernels/triton/accelerators.py``.
    """
    if "cuda" in DEVICES:
        from ..triton import KERNELS, check_capability
        from ..triton.accelerators import CANDIDATES
        from ..triton.accelerators import accelerate as judge_all

        device = torch.device("cuda", torch.cuda.current_device())
        check_capability(device.index)
        _verdicts[:] = judge_all(KERNELS, device, CANDIDATES)
    return tuple(_verdicts)


def accelerators() -> list[dict[str, Any]]:
    """The verdicts of the last `accelerate`, as plain data for a manifest: name, op, on, reason."""
    return [vars(verdict) for verdict in _verdicts]
