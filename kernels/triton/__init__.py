"""The kernels for NVIDIA GPUs, file by file as in ``kernels/cpu``. Importing this package needs triton.

Norm, rotary, activation, router, permutation, combination, embedding, bias gradient, quantisers, and everything from
logits on are cross-device: the CPU backend's bits. Matrix products and attention follow profile ``sm90-bf16``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch

from . import (
    activation,
    attention,
    attention_backward,
    grouped_linear,
    linear,
    logprob,
    moe,
    norm,
    quantize,
    quantized_linear,
    rotary,
    router,
    sampling,
)
from . import selected_logprob as head
from .accelerators import dispatch

KERNELS: dict[str, Callable[..., None]] = {
    "attention_backward": attention_backward.attention_backward,
    "attention_paged": attention.attention_paged,
    "attention_varlen": attention.attention_varlen,
    "bias_grad": linear.bias_grad,
    "dequantize": quantize.dequantize,
    "embedding": linear.embedding,
    "embedding_dw": linear.embedding_dw,
    "grouped_linear": grouped_linear.grouped_linear,
    "grouped_linear_dw": grouped_linear.grouped_linear_dw,
    "grouped_linear_dx": grouped_linear.grouped_linear_dx,
    "int4_linear": quantized_linear.int4_linear,
    "linear": linear.linear,
    "linear_dw": linear.linear_dw,
    "linear_dx": linear.linear_dx,
    "logprob_from_logits": logprob.logprob_from_logits,
    "logprob_merge": head.logprob_merge,
    "logprob_segments": head.logprob_segments,
    "moe_combine": moe.moe_combine,
    "moe_combine_backward": moe.moe_combine_backward,
    "moe_gather": moe.moe_gather,
    "moe_order": moe.moe_order,
    "quantize": quantize.quantize,
    "rms_norm": norm.rms_norm,
    "rms_norm_backward": norm.rms_norm_backward,
    "rotary": rotary.rotary,
    "router_topk": router.router_topk,
    "router_topk_backward": router.router_topk_backward,
    "sample": sampling.sample,
    "scaled_linear": quantized_linear.scaled_linear,
    "selected_logprob": head.selected_logprob,
    "selected_logprob_backward": head.selected_logprob_backward,
    "silu_and_mul": activation.silu_and_mul,
    "silu_and_mul_backward": activation.silu_and_mul_backward,
}
"""Operator of ``torch.ops.zerokl`` to its implementation, arguments as in the schema. Others fail on CUDA tensors."""

_registered: list[torch.library.Library] = []


def register() -> None:
    """Make KERNELS the CUDA implementations of ``torch.ops.zerokl``; the schemas must be loaded. Once per process."""
    if _registered:
        return
    library = torch.library.Library("zerokl", "IMPL", "CUDA")
    for name, kernel in KERNELS.items():
        library.impl(name, _on_own_device(dispatch(name, kernel)))
    _registered.append(library)


@cache
def check_capability(index: int) -> None:
    """RuntimeError for a GPU whose matrix steps are those of another profile (R1)."""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 9:
        raise RuntimeError(
            f"zerokl.kernels: cuda:{index} has compute capability {major}.{minor}; supported: 9.0 and newer "
            "(profile sm90-bf16). Use such a GPU, or CPU tensors"
        )


def _on_own_device(kernel: Callable[..., None]) -> Callable[..., None]:
    """Triton launches on the current device, which need not be the tensors'."""

    @wraps(kernel)
    def run(first: torch.Tensor | list[torch.Tensor], *rest: object) -> None:
        one = first[0] if isinstance(first, list) else first
        check_capability(one.device.index)
        with torch.cuda.device_of(one):
            kernel(first, *rest)

    return run
