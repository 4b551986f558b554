"""Mixture of experts (R8, R9): router, permutation, expert layers, combination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ._common import WeightGrad, check, check_bf16, check_device, check_segments, needs_grad, ops

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Groups:
    """Group-limited choice (DeepSeek-V3): experts form ``count`` equal neighbouring groups, the best ``keep`` stay.

    A group is judged by the sum of its ``judges`` best selection scores.
    """

    count: int
    keep: int
    judges: int = 2


class Routing(NamedTuple):
    """weights fp32 [T, k] and expert indices int64 [T, k], in slot order."""

    weights: torch.Tensor
    indices: torch.Tensor


class Permutation(NamedTuple):
    """Rows ordered by (expert, token, slot).

    offsets int64 [E + 1]: expert e owns rows [offsets[e], offsets[e + 1]). source int64 [T k]: the ``token k + slot``
    of each row. position int64 [T, k]: the row of each slot.
    """

    offsets: torch.Tensor
    source: torch.Tensor
    position: torch.Tensor


class _RouterTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        indices: torch.Tensor,
        replay: bool,
        groups: Groups,
        options: tuple[bool, bool, float],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.empty(indices.shape, dtype=torch.float32, device=logits.device)
        sigmoid, renormalize, scale = options
        ops.router_topk(
            logits,
            bias,
            sigmoid,
            groups.count,
            groups.keep,
            groups.judges,
            renormalize,
            scale,
            replay,
            weights,
            indices,
        )
        ctx.save_for_backward(logits, indices)
        ctx.options = options
        ctx.mark_dirty(indices)
        ctx.mark_non_differentiable(indices)
        return weights, indices

    @staticmethod
    def backward(ctx: Any, dweights: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, indices = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        ops.router_topk_backward(logits, indices, dweights.contiguous(), *ctx.options, dlogits)
        return dlogits, *[None] * 5


def router_topk(
    logits: torch.Tensor,
    k: int,
    *,
    scoring: Scoring,
    groups: Groups | None = None,
    bias: torch.Tensor | None = None,
    replay: torch.Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routing:
    """The k experts of each token and their weights, all in fp32 (R8).

    Args:
        logits: fp32 [T, E].
        k: experts per token.
        scoring: ``softmax`` over all experts (Qwen3-MoE) or ``sigmoid`` (DeepSeek-V3, GLM).
        groups: limits the choice to the best groups of experts.
        bias: fp32 [E], added to the scores for the choice only.
        replay: integer [T, k], the experts to use instead of choosing (rollout routing replay, R3); their weights
            come from the live scores, so gradients still reach the router.
        renormalize: divide the k scores by their sum, added in slot order.
        scale: multiplies the weights last.

    Returns:
        :class:`Routing`, slots ordered by (selection score descending, expert index ascending) or as replayed.
        Gradients flow through the weights; the choice is constant.

    Raises:
        ValueError: unsupported dtype, shape or option. RuntimeError: a replayed index outside [0, E) or named twice.
    """
    op = "router_topk"
    check(
        logits.dim() == 2 and logits.dtype == torch.float32,
        op,
        f"logits must be fp32 [T, E], got {logits.dtype} {tuple(logits.shape)}",
    )
    check_device(op, logits=logits, bias=bias, replay=replay)
    tokens, experts = logits.shape
    check(1 <= k <= experts, op, f"k={k} of {experts} experts")
    check(scoring in ("softmax", "sigmoid"), op, f"scoring {scoring!r}; supported: softmax, sigmoid")
    limits = groups or Groups(1, 1)
    check(
        1 <= limits.keep <= limits.count <= 64
        and experts % limits.count == 0
        and limits.judges >= 1
        and limits.keep * (experts // limits.count) >= k,
        op,
        f"{limits} leaves no {k} of {experts} experts to choose (at most 64 equal groups)",
    )
    check(
        bias is None or (bias.shape == (experts,) and bias.dtype == torch.float32), op, f"bias must be fp32 [{experts}]"
    )
    if replay is None:
        indices = torch.empty((tokens, k), dtype=torch.int64, device=logits.device)
    else:
        check(
            replay.shape == (tokens, k) and not replay.dtype.is_floating_point and replay.dtype != torch.bool,
            op,
            f"replay is {replay.dtype} {tuple(replay.shape)}; expected integers ({tokens}, {k})",
        )
        indices = replay.to(torch.int64, copy=True).contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    options = (scoring == "sigmoid", renormalize, scale)
    return Routing(*_RouterTopk.apply(logits.contiguous(), bias, indices, replay is not None, limits, options))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        ctx.position = permutation.position
        return _gather(x, permutation)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _combine(dy.contiguous(), ctx.position, None, None), None


def _gather(x: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    y = torch.empty((permutation.source.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    ops.moe_gather(x, permutation.source, permutation.position.shape[1], y)
    return y


def _combine(
    y: torch.Tensor, position: torch.Tensor, weights: torch.Tensor | None, shared: torch.Tensor | None
) -> torch.Tensor:
    out = torch.empty((position.shape[0], y.shape[1]), dtype=y.dtype, device=y.device)
    ops.moe_combine(y, position, weights, shared, out)
    return out


def moe_permute(x: torch.Tensor, indices: torch.Tensor, experts: int) -> tuple[torch.Tensor, Permutation]:
    """Copies each token's row once per slot, ordered by (expert, token, slot).

    Args:
        x: bf16 [T, H].
        indices: integer [T, k], the expert of each slot.
        experts: number of experts E.

    Returns:
        (bf16 [T k, H], :class:`Permutation`). Backward adds each token's k gradients in slot order in fp32, one
        rounding, no atomics.

    Raises:
        ValueError: unsupported dtype or shape. RuntimeError: an index outside [0, E).
    """
    op = "moe_permute"
    check_bf16(op, x=x)
    check_device(op, x=x, indices=indices)
    check(
        x.dim() == 2 and indices.dim() == 2 and indices.shape[0] == x.shape[0],
        op,
        f"x {tuple(x.shape)} and indices {tuple(indices.shape)}; expected [T, H] and [T, k]",
    )
    check(not indices.dtype.is_floating_point, op, f"indices are {indices.dtype}; supported: integers")
    check(experts >= 1, op, f"experts={experts} must be positive")
    rows = indices.numel()
    permutation = Permutation(
        torch.empty(experts + 1, dtype=torch.int64, device=x.device),
        torch.empty(rows, dtype=torch.int64, device=x.device),
        torch.empty(indices.shape, dtype=torch.int64, device=x.device),
    )
    ops.moe_order(indices.to(torch.int64).contiguous(), *permutation)
    x = x.contiguous()
    return (_Permute.apply(x, permutation) if needs_grad(x) else _gather(x, permutation)), permutation


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weights: torch.Tensor, shared: torch.Tensor | None, position: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y, weights, position)
        return _combine(y, position, weights, shared)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, weights, position = ctx.saved_tensors
        dy, dweights, dout = torch.empty_like(y), torch.empty_like(weights), dout.contiguous()
        ops.moe_combine_backward(y, position, weights, dout, dy, dweights)
        return dy, dweights, dout if ctx.needs_input_grad[2] else None, None


def moe_combine(
    y: torch.Tensor, permutation: Permutation, weights: torch.Tensor, *, shared: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted sum of each token's expert outputs: an fma chain over slots in fp32, one rounding (R8).

    Args:
        y: bf16 [T k, H], the experts' outputs in the permuted order.
        permutation: what :func:`moe_permute` returned.
        weights: fp32 [T, k].
        shared: bf16 [T, H], the shared expert's output, added last in fp32.

    Returns:
        bf16 [T, H]. Backward: dy = weight dout, dweights by R3, no atomics.

    Raises:
        ValueError: unsupported dtype or shape.
    """
    op, position = "moe_combine", permutation.position
    check_bf16(op, y=y, shared=shared)
    check_device(op, y=y, weights=weights, position=position)
    check(
        y.dim() == 2 and y.shape[0] == position.numel(),
        op,
        f"y {tuple(y.shape)} does not have the {position.numel()} permuted rows",
    )
    check(
        weights.shape == position.shape and weights.dtype == torch.float32,
        op,
        f"weights must be fp32 {tuple(position.shape)}, got {weights.dtype} {tuple(weights.shape)}",
    )
    check(shared is None or shared.shape == (position.shape[0], y.shape[1]), op, "shared must have shape [T, H]")
    y, weights = y.contiguous(), weights.contiguous()
    shared = None if shared is None else shared.contiguous()
    if needs_grad(y, weights, shared):
        return _Combine.apply(y, weights, shared, position)
    return _combine(y, position, weights, shared)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, segments: int, out_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, w, offsets)
        ctx.weight = w
        return _grouped_linear(x, w, offsets, segments, out_dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        dy = dy.to(torch.bfloat16).contiguous()  # the gradient of an fp32 output is rounded once
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            ops.grouped_linear_dx(dy, w, offsets, dx)
        if ctx.needs_input_grad[1]:
            grad = WeightGrad(ctx.weight)
            ops.grouped_linear_dw(dy, x, offsets, grad.buffer)
            dw = grad.result()
        return dx, dw, None, None, None


def _grouped_linear(
    x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, segments: int, out_dtype: torch.dtype
) -> torch.Tensor:
    y = torch.empty((x.shape[0], w.shape[1]), dtype=out_dtype, device=x.device)
    ops.grouped_linear(x, w, offsets, segments, y)
    return y


def grouped_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    *,
    segments: int = 1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x[offsets[e] : offsets[e + 1]] @ w[e].T`` for every expert: the rows of each follow R1 and R2 of ``linear``.

    Args:
        x: bf16 [R, K], rows grouped by expert.
        w: bf16 [E, N, K].
        offsets: int64 [E + 1] from 0 to R, never falling; an expert may own no row, or all.
        segments, out_dtype: as in :func:`linear`.

    Returns:
        [R, N]. Backward as ``linear``, expert by expert (dw into ``w.main_grad`` if there is one).

    Raises:
        ValueError: unsupported dtype, shape or segment count. RuntimeError: offsets that do not fit.
    """
    op = "grouped_linear"
    check_bf16(op, x=x, w=w)
    check_device(op, x=x, offsets=offsets)
    check(
        x.dim() == 2 and w.dim() == 3 and x.shape[1] == w.shape[2],
        op,
        f"x {tuple(x.shape)} does not fit w {tuple(w.shape)}; expected [R, K] and [E, N, K]",
    )
    check(
        offsets.shape == (w.shape[0] + 1,) and offsets.dtype == torch.int64,
        op,
        f"offsets are {offsets.dtype} {tuple(offsets.shape)}; expected int64 ({w.shape[0] + 1},)",
    )
    out_dtype = out_dtype or torch.bfloat16
    check(
        out_dtype in (torch.bfloat16, torch.float32),
        op,
        lambda: f"out_dtype {out_dtype}; supported: bfloat16, float32",
    )
    check_segments(op, segments, w.shape[2])
    check(w.is_contiguous(), op, "w must be contiguous")
    x, offsets = x.contiguous(), offsets.contiguous()
    forward = _GroupedLinear.apply if needs_grad(x, w) else _grouped_linear
    return forward(x, w, offsets, segments, out_dtype)
