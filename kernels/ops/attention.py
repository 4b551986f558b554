"""Attention over packed sequences and over pages (R5, R9). Dao et al., "FlashAttention", 2022."""

from __future__ import annotations

from typing import Any

import torch

from ._common import check, check_bf16, check_device, ops


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu: torch.Tensor,
        scale: float,
        causal: bool,
        window: int,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        ops.attention_varlen(q, k, v, cu, scale, causal, window, sinks, out, lse)
        ctx.save_for_backward(q, k, v, cu, sinks, out, lse)
        ctx.options = (scale, causal, window)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, cu, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        rows = dsinks = None
        if ctx.needs_input_grad[7]:
            rows, dsinks = torch.empty_like(lse), torch.empty_like(sinks)
        ops.attention_backward(q, k, v, cu, *ctx.options, sinks, out, lse, dout.contiguous(), dq, dk, dv, rows, dsinks)
        return dq, dk, dv, None, None, None, None, dsinks


def _options(
    op: str, q: torch.Tensor, kv_heads: int, dim: int, window: int | None, sinks: torch.Tensor | None
) -> tuple[int, torch.Tensor | None]:
    """Window (0: none) and sinks (fp32) as the compiled ops take them, once everything is checked."""
    check(q.dim() == 3, op, lambda: f"q {tuple(q.shape)} must be [T, heads, D]")
    check(q.shape[2] == dim, op, lambda: f"q has head dim {q.shape[2]}, keys {dim}")
    check(
        kv_heads > 0 and q.shape[1] % kv_heads == 0,
        op,
        lambda: f"{q.shape[1]} query heads are not a multiple of {kv_heads} key heads",
    )
    check(window is None or window > 0, op, lambda: f"window={window} must be positive")
    check(
        sinks is None or (sinks.shape == (q.shape[1],) and sinks.dtype in (torch.float32, torch.bfloat16)),
        op,
        lambda: f"sinks must be fp32 or bf16 [{q.shape[1]}]",
    )
    return window or 0, None if sinks is None else sinks.float().contiguous()


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of packed sequences: full-sequence training and scoring.

    Args:
        q: bf16 [T, H, D]; k: bf16 [T, Hk, D]; v: bf16 [T, Hk, Dv]; H a multiple of Hk.
        cu_seqlens: int32 [B + 1], ascending from 0 to T; sequences attend within themselves.
        scale: multiplies q.k.
        causal: a query sees keys up to its own position.
        window: a query sees only the last ``window`` keys, itself included.
        sinks: fp32 or bf16 [H], a logit per head that joins every row's softmax without a value (gpt-oss).

    Returns:
        bf16 [T, H, Dv]; the same bits as :func:`attention_paged` on the same keys.

    Raises:
        ValueError: unsupported dtype, shape or option. RuntimeError: cu_seqlens that do not ascend from 0 to T.
    """
    op = "attention_varlen"
    check_bf16(op, q=q, k=k, v=v)
    check_device(op, q=q, cu_seqlens=cu_seqlens)
    check(
        k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2] and k.shape[0] == q.shape[0],
        op,
        lambda: f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [T, Hk, D] and [T, Hk, Dv] with q's T",
    )
    width, sinks = _options(op, q, k.shape[1], k.shape[2], window, sinks)
    cu = cu_seqlens.to(torch.int32).contiguous()
    check(cu.dim() == 1 and cu.numel() >= 1, op, lambda: f"cu_seqlens {tuple(cu.shape)} must be [B + 1]")
    return _AttentionVarlen.apply(q.contiguous(), k.contiguous(), v.contiguous(), cu, scale, causal, width, sinks)


def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    q_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over a paged key-value cache: decode, chunked prefill and prefix hits are one case. No gradient.

    Args:
        q: bf16 [T, H, D], the last ``q_lens[b]`` positions of each sequence, packed.
        k_cache, v_cache: bf16 [pages, page_size, Hk, D] and [..., Dv].
        page_table: int32 [B, max_pages]; position p of sequence b lies in page ``page_table[b, p // page_size]``.
        seq_lens: int32 [B], keys of each sequence, the new ones included (already in the cache).
        q_lens: int32 [B].
        scale, window, sinks: as in :func:`attention_varlen`.

    Returns:
        bf16 [T, H, Dv]; bits depend on neither pages, their order, nor how the queries were cut into calls.

    Raises:
        ValueError: unsupported dtype, shape or option. RuntimeError: a page or length out of range.
    """
    op = "attention_paged"
    check_bf16(op, q=q, k_cache=k_cache, v_cache=v_cache)
    check_device(op, q=q, page_table=page_table, seq_lens=seq_lens, q_lens=q_lens)
    check(
        k_cache.dim() == v_cache.dim() == 4 and k_cache.shape[:3] == v_cache.shape[:3],
        op,
        "caches must be [pages, page_size, Hk, D] and [pages, page_size, Hk, Dv]",
    )
    width, sinks = _options(op, q, k_cache.shape[2], k_cache.shape[3], window, sinks)
    check(
        page_table.dim() == 2 and seq_lens.shape == q_lens.shape == page_table.shape[:1],
        op,
        "page_table [B, n], seq_lens [B] and q_lens [B] disagree",
    )
    out = torch.empty((*q.shape[:2], v_cache.shape[3]), dtype=q.dtype, device=q.device)
    table, lens, queries = (t.to(torch.int32).contiguous() for t in (page_table, seq_lens, q_lens))
    ops.attention_paged(q.contiguous(), k_cache, v_cache, table, lens, queries, scale, width, sinks, out)
    return out
