"""Forward and gradients against autograd of the same function in float64, op by op.

The tolerance is a share of the largest magnitude, 2^-7: bf16 results are rounded once (2^-9) and may come from values
that were rounded on the way. Attention, the router and the quantised linears have theirs beside their own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from data import hashed
from torch.nn import functional

from zerokl import kernels

TOLERANCE = 2.0**-7
OFFSETS = torch.tensor([0, 0, 9, 10, 24])
EXPERTS = torch.tensor([[1, 3], [0, 2], [3, 1], [2, 3], [1, 0]])
POSITIONS = torch.arange(12) * 5 % 40
TARGETS = torch.arange(11) * 37 % 300


@dataclass(frozen=True)
class Case:
    """``ours`` and ``exact`` map the leaves to one output; ``exact`` gets them in float64."""

    leaves: Callable[[], list[torch.Tensor]]
    ours: Callable[..., torch.Tensor]
    exact: Callable[..., torch.Tensor]


def exact_norm(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


def exact_rotary(x):
    table = kernels.rotary_table(40, 32, 1e4).double()[POSITIONS][:, None]
    (a, b), (cos, sin) = x.chunk(2, -1), table.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def exact_swiglu(x, weight=None):
    gate, up = x.chunk(2, -1)
    y = functional.silu(gate) * up
    return y if weight is None else y * weight[:, None]


def exact_experts(x, w):
    parts = zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), w, strict=True)
    return torch.cat([x[a:b] @ weight.T for a, b, weight in parts])


def permute(x):
    return kernels.moe_permute(x, EXPERTS, 4)[0]


def exact_permute(x):
    return x[torch.argsort(EXPERTS.flatten(), stable=True) // 2]


def combine(y, weights, shared):
    return kernels.moe_combine(y, kernels.moe_permute(shared.detach(), EXPERTS, 4)[1], weights, shared=shared)


def exact_combine(y, weights, shared):
    position = torch.argsort(torch.argsort(EXPERTS.flatten(), stable=True)).reshape(EXPERTS.shape)
    return (y[position] * weights[..., None]).sum(1) + shared


def exact_logprob(hidden, w, temperature=0.7):
    return torch.log_softmax(hidden @ w.T / temperature, -1).gather(1, TARGETS[:, None])[:, 0]


CASES = {
    "linear": Case(
        lambda: [hashed(33, 70, seed=1), hashed(21, 70, seed=2), hashed(21, seed=3)],
        kernels.linear,
        lambda x, w, b: x @ w.T + b,
    ),
    "linear, fp32, segments": Case(
        lambda: [hashed(33, 72, seed=1), hashed(21, 72, seed=2)],
        lambda x, w: kernels.linear(x, w, segments=4, out_dtype=torch.float32),
        lambda x, w: x @ w.T,
    ),
    "grouped_linear": Case(
        lambda: [hashed(24, 40, seed=1), hashed(4, 30, 40, seed=2)],
        lambda x, w: kernels.grouped_linear(x, w, OFFSETS),
        exact_experts,
    ),
    "embedding": Case(
        lambda: [hashed(9, 40, seed=1)],
        lambda w: kernels.embedding(torch.tensor([3, 1, 3, 8]), w),
        lambda w: w[torch.tensor([3, 1, 3, 8])],
    ),
    "rms_norm": Case(
        lambda: [hashed(17, 150, seed=1), hashed(150, seed=2)], lambda x, w: kernels.rms_norm(x, w, 1e-5), exact_norm
    ),
    "rms_norm, per head": Case(
        lambda: [hashed(7, 3, 64, seed=1), hashed(64, seed=2)], lambda x, w: kernels.rms_norm(x, w, 1e-5), exact_norm
    ),
    "rms_norm, residual": Case(
        lambda: [hashed(17, 150, seed=1), hashed(17, 150, seed=3), hashed(150, seed=2)],
        lambda x, r, w: torch.cat(kernels.rms_norm(x, w, 1e-5, residual=r), -1),
        lambda x, r, w: torch.cat([exact_norm(x + r, w), x + r], -1),
    ),
    "rotary": Case(
        lambda: [hashed(12, 3, 32, seed=1)],
        lambda q: kernels.rotary(q, q, POSITIONS, kernels.rotary_table(40, 32, 1e4))[0],
        exact_rotary,
    ),
    "silu_and_mul": Case(lambda: [hashed(13, 120, seed=1) * 4], kernels.silu_and_mul, exact_swiglu),
    "silu_and_mul, row weight": Case(
        lambda: [hashed(13, 120, seed=1) * 4, hashed(13, seed=2).float()],
        lambda x, w: kernels.silu_and_mul(x, row_weight=w),
        exact_swiglu,
    ),
    "moe_permute": Case(lambda: [hashed(5, 40, seed=1)], permute, exact_permute),
    "moe_combine": Case(
        lambda: [hashed(10, 40, seed=1), hashed(5, 2, seed=2).float(), hashed(5, 40, seed=3)], combine, exact_combine
    ),
    "selected_logprob": Case(
        lambda: [hashed(11, 48, seed=1), hashed(300, 48, seed=2)],
        lambda hidden, w: kernels.selected_logprob(hidden, w, TARGETS, temperature=0.7).logprob,
        exact_logprob,
    ),
}


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = (got.double() - want).abs().max() / want.abs().max()
    assert error < TOLERANCE, f"{what}: off by {error:.2e} of the largest value"


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case = CASES[name]
    leaves = [t.requires_grad_() for t in case.leaves()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out, exact = case.ours(*leaves), case.exact(*wide)
    close(out, exact, "forward")
    grad = hashed(*out.shape, seed=90).to(out.dtype)
    got = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(exact, wide, grad.double())
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        close(a, b, f"gradient of argument {index}")


def test_the_tolerance_would_notice():
    """A gradient that forgets one of 70 terms is outside the tolerance."""
    case = CASES["linear"]
    x, w, b = (t.double().requires_grad_() for t in case.leaves())
    cut = torch.cat([x[:, :69], x[:, 69:].detach() * 0], 1)
    with pytest.raises(AssertionError, match="forward: off by"):
        close(case.exact(cut, w, b), case.exact(x, w, b), "forward")
