"""Rotary position embedding (R7). Su et al., "RoFormer", 2021."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ._common import check, check_bf16, check_device, needs_grad, ops


@lru_cache(maxsize=16)
def rotary_table(max_positions: int, dim: int, base: float) -> torch.Tensor:
    """The fp32 table both engines read: [max_positions, dim], cosines then sines of ``position * base^(-2i/dim)``.

    Built on the CPU in float64 and rounded once, so its bytes are the same everywhere. Cached: do not write to it.
    """
    check(dim > 0 and dim % 2 == 0, "rotary_table", f"dim={dim} must be even")
    inverse = 1.0 / (float(base) ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    angle = torch.arange(max_positions, dtype=torch.float64)[:, None] * inverse
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def _turn(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, inverse: bool) -> torch.Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ops.rotary(x, positions, table, inverse, y)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(positions, table)
        return _turn(q, positions, table, False), _turn(k, positions, table, False)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        positions, table = ctx.saved_tensors
        return _turn(dq, positions, table, True), _turn(dk, positions, table, True), None, None


def rotary(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, half style: dimension i pairs with i + rotary_dim / 2; the rest passes through.

    Args:
        q, k: bf16 [T, heads, D] (any strides with a contiguous last dimension).
        positions: int64 [T].
        table: fp32 [max_positions, rotary_dim] from :func:`rotary_table`, rotary_dim <= D.

    Returns:
        bf16 q, k, contiguous; fp32 arithmetic, one rounding.

    Raises:
        ValueError: unsupported dtype or shape. RuntimeError: a position outside the table.
    """
    check_bf16("rotary", q=q, k=k)
    check_device("rotary", q=q, positions=positions, table=table)
    check(
        q.dim() == 3 and k.dim() == 3 and q.shape[::2] == k.shape[::2],
        "rotary",
        f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [T, heads, D]",
    )
    check(positions.shape == q.shape[:1], "rotary", f"positions {tuple(positions.shape)}; expected ({q.shape[0]},)")
    check(
        table.dtype == torch.float32 and table.dim() == 2 and table.shape[1] <= q.shape[2],
        "rotary",
        "table must be fp32 [positions, rotary_dim <= D]",
    )
    positions, table = positions.to(torch.int64).contiguous(), table.contiguous()
    if needs_grad(q, k):
        return _Rotary.apply(q, k, positions, table)
    return _turn(q, positions, table, False), _turn(k, positions, table, False)
