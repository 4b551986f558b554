"""Selected log-probabilities (R6, R9), fused with the output head or from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._common import WeightGrad, check, check_bf16, check_device, ops, per_row


class SelectedLogprob(NamedTuple):
    """logprob fp32 [T]; entropy fp32 [T] (nats) or None."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None


class _SelectedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        w: torch.Tensor,
        targets: torch.Tensor,
        temperature: torch.Tensor,
        top_p: torch.Tensor,
        top_k: torch.Tensor,
        with_entropy: bool,
    ) -> Any:
        rows = hidden.shape[0]
        logprob = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprob) if with_entropy else None
        state = torch.empty((rows, 2), dtype=torch.float32, device=hidden.device)
        cut, cut_index = torch.empty_like(logprob), torch.empty_like(targets)
        ops.selected_logprob(hidden, w, targets, temperature, top_p, top_k, logprob, entropy, state, cut, cut_index)
        ctx.save_for_backward(hidden, w, targets, temperature, state, cut, cut_index)
        ctx.weight = w
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, dlogprob: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, w, *rest = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad = WeightGrad(ctx.weight) if ctx.needs_input_grad[1] else None
        ops.selected_logprob_backward(
            hidden, w, *rest, dlogprob.contiguous(), dhidden, None if grad is None else grad.buffer
        )
        return (
            None if dhidden is None else dhidden.to(hidden.dtype),
            None if grad is None else grad.result(),
            *[None] * 5,
        )


def _check_sampling(op: str, temperature: torch.Tensor, top_p: torch.Tensor) -> None:
    check(bool((temperature > 0).all()), op, "temperature must be positive; score greedy tokens at temperature 1")
    check(bool(((top_p > 0) & (top_p <= 1)).all()), op, "top_p must lie in (0, 1]")


def selected_logprob(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    top_p: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    entropy: bool = False,
) -> SelectedLogprob:
    """Log-probability of each row's target under ``softmax(hidden @ w.T / temperature)``, top-p and top-k renormalised.

    No [T, V] tensor is stored; the backward recomputes the logits block by block.

    Args:
        hidden: bf16 [T, H].
        w: bf16 [V, H].
        targets: int64 [T].
        temperature, top_p, top_k: scalars or [T]; 1 and 0 switch the filters off. An entry stays if fewer than top_k
            precede it and the mass before it is below top_p, in the order (logit descending, index ascending).
        entropy: also return the entropy (no gradient flows through it).

    Returns:
        :class:`SelectedLogprob`; the same bits as :func:`logprob_from_logits` and :func:`sample` on the same rows.
        A target outside the kept set gets -inf.

    Raises:
        ValueError: unsupported dtype, shape or range. RuntimeError: a target outside [0, V).
    """
    op = "selected_logprob"
    check_bf16(op, hidden=hidden, w=w)
    check_device(op, hidden=hidden, targets=targets)
    check(
        hidden.dim() == 2 and w.dim() == 2 and hidden.shape[1] == w.shape[1],
        op,
        f"hidden {tuple(hidden.shape)} does not fit w {tuple(w.shape)}",
    )
    check(targets.shape == hidden.shape[:1], op, f"targets {tuple(targets.shape)}; expected ({hidden.shape[0]},)")
    rows = hidden.shape[0]
    t, p, k = (
        per_row(temperature, rows, torch.float32, hidden.device, op, "temperature"),
        per_row(top_p, rows, torch.float32, hidden.device, op, "top_p"),
        per_row(top_k, rows, torch.int32, hidden.device, op, "top_k"),
    )
    _check_sampling(op, t, p)
    return SelectedLogprob(
        *_SelectedLogprob.apply(hidden.contiguous(), w, targets.to(torch.int64).contiguous(), t, p, k, entropy)
    )


def logprob_from_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    top_p: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
) -> torch.Tensor:
    """The same from fp32 logits [T, V] (no gradient): fp32 [T]. Arguments and errors as :func:`selected_logprob`."""
    op = "logprob_from_logits"
    check(
        logits.dim() == 2 and logits.dtype == torch.float32,
        op,
        f"logits must be fp32 [T, V], got {logits.dtype} {tuple(logits.shape)}",
    )
    check_device(op, logits=logits, targets=targets)
    check(targets.shape == logits.shape[:1], op, f"targets {tuple(targets.shape)}; expected ({logits.shape[0]},)")
    rows = logits.shape[0]
    t, p, k = (
        per_row(temperature, rows, torch.float32, logits.device, op, "temperature"),
        per_row(top_p, rows, torch.float32, logits.device, op, "top_p"),
        per_row(top_k, rows, torch.int32, logits.device, op, "top_k"),
    )
    _check_sampling(op, t, p)
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ops.logprob_from_logits(logits.contiguous(), targets.to(torch.int64).contiguous(), t, p, k, out, None)
    return out
