"""Mixture-of-experts layers."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from zerokl import kernels
from zerokl.bench.regression.case import Case, Tensors, hashed


def _routed(tokens: int, experts: int, k: int) -> torch.Tensor:
    """Expert indices [tokens, k]."""
    logits = hashed(tokens, experts, seed=20, scale=4).float()
    return kernels.router_topk(logits, k, scoring="softmax").indices


def _round_robin(tokens: int, experts: int, k: int) -> torch.Tensor:
    """Expert indices [tokens, k] that name as many experts as there are slots."""
    return torch.arange(tokens * k).reshape(tokens, k) % experts


def _grouped_inputs(indices: torch.Tensor, experts: int, width: int, inner: int) -> Tensors:
    rows, permutation = kernels.moe_permute(hashed(len(indices), width, seed=21), indices, experts)
    return rows, hashed(experts, inner, width, seed=22), permutation.offsets


def _combine_inputs(tokens: int, experts: int, k: int, width: int) -> Tensors:
    _, permutation = kernels.moe_permute(hashed(tokens, 1, seed=0), _routed(tokens, experts, k), experts)
    return hashed(tokens * k, width, seed=23), hashed(tokens, k, seed=24).float(), *permutation


def moe_cases(small: bool) -> list[Case]:
    """The layers of Qwen3-30B-A3B: 128 experts, 8 a token, gate and up projection in one."""
    experts, k, width, inner = (16, 4, 128, 96) if small else (128, 8, 2048, 2 * 768)
    few, many = (3, 64) if small else (16, 4096)
    made = [
        Case(
            "router_topk", lambda: (hashed(many, experts, seed=20, scale=4),),
            lambda z: tuple(kernels.router_topk(z.float(), k, scoring="softmax")), True, True,
            lambda z: torch.topk(torch.softmax(z.float(), -1), k), gigabytes=many * (4 * experts + 12 * k) * 1e-9,
        ),
        Case(
            "router_topk groups", lambda: (hashed(many, experts, seed=20, scale=4), hashed(experts, seed=25).float()),
            lambda z, b: tuple(
                kernels.router_topk(z.float(), k, scoring="sigmoid", bias=b, groups=kernels.Groups(8, 4), scale=2.5)
            ), True, True, gigabytes=many * (4 * experts + 12 * k) * 1e-9,
        ),
        Case(
            "moe_permute", lambda: (hashed(many, width, seed=21), _routed(many, experts, k)),
            lambda x, i: (kernels.moe_permute(x, i, experts)[0],), True,
            torch_run=lambda x, i: x[i.flatten().argsort(stable=True) // k], gigabytes=2e-9 * many * (k + 1) * width,
        ),
        Case(
            "moe_combine", partial(_combine_inputs, many, experts, k, width),
            lambda y, w, *permutation: (kernels.moe_combine(y, kernels.Permutation(*permutation), w),), True,
            torch_run=lambda y, w, *permutation: (y[permutation[2]] * w[..., None]).sum(1),
            gigabytes=2e-9 * many * (k + 1) * width,
        ),
        Case(
            "silu_and_mul row_weight", lambda: (hashed(many * k, inner, seed=26), hashed(many * k, seed=27).float()),
            lambda x, w: (kernels.silu_and_mul(x, row_weight=w),), True, gigabytes=3e-9 * many * k * inner,
        ),
    ]  # fmt: skip
    for tokens, route in ((few, _round_robin), (many, _routed)):
        inputs = partial(_grouped_inputs, route(tokens, experts, k), experts, width, inner)
        made.append(
            Case(
                f"grouped_linear T={tokens}", inputs,
                lambda x, w, o: (kernels.grouped_linear(x, w, o),), False,
                torch_run=lambda x, w, o: functional.grouped_mm(x, w.transpose(1, 2), offs=o[1:].int()),
                gigabytes=2e-9 * min(experts, tokens * k) * inner * width, teraflops=2e-12 * tokens * k * inner * width,
            )
        )  # fmt: skip
    return made
