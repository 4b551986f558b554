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


def _turn(
    x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ops.rotary(x, positions, table, interleaved, inverse, y)
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(positions, table)
        ctx.interleaved = interleaved
        return _turn(q, positions, table, interleaved, False), _turn(k, positions, table, interleaved, False)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        positions, table = ctx.saved_tensors
        dq, dk = (_turn(grad, positions, table, ctx.interleaved, True) for grad in (dq, dk))
        return dq, dk, None, None, None


def rotary(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first rotary_dim dimensions of queries and keys by pairs; the others pass through unchanged.

    Args:
        q, k: bf16 [T, heads, D] (any strides with a contiguous last dimension).
        positions: int64 [T].
        table: fp32 [max_positions, rotary_dim] from :func:`rotary_table`; rotary_dim even, at most D.
        interleaved: pair dimensions 2i and 2i + 1 (GPT-J); otherwise i and i + rotary_dim / 2 (GPT-NeoX, Llama).

    Returns:
        bf16 q, k, contiguous; fp32 arithmetic, one rounding.

    Raises:
        ValueError: unsupported dtype or shape. RuntimeError: a position outside the table.
    """
    check_bf16("rotary", q=q, k=k)
    check_device("rotary", q=q, positions=positions, table=table)
    check(
        q.dim() == k.dim() == 3 and q.shape[::2] == k.shape[::2],
        "rotary",
        f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [T, heads, D] with one T and D",
    )
    check(positions.shape == q.shape[:1], "rotary", f"positions {tuple(positions.shape)}; expected ({q.shape[0]},)")
    check(
        table.dtype == torch.float32 and table.dim() == 2 and 0 < table.shape[1] <= q.shape[2],
        "rotary",
        f"table {table.dtype} {tuple(table.shape)} must be fp32 [positions, rotary_dim], rotary_dim in 1..{q.shape[2]}",
    )
    check(table.shape[1] % 2 == 0, "rotary", f"table turns {table.shape[1]} dimensions; supported: an even number")
    positions, table = positions.to(torch.int64).contiguous(), table.contiguous()
    if needs_grad(q, k):
        return _Rotary.apply(q, k, positions, table, interleaved)
    return _turn(q, positions, table, interleaved, False), _turn(k, positions, table, interleaved, False)
