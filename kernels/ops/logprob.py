"""Selected log-probabilities (R6, R9), fused with the output head or from logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..contract import VOCAB_SEGMENTS
from ._common import WeightGrad, check, check_bf16, check_device, ops, per_row
from .collective import tree_all_reduce


class SelectedLogprob(NamedTuple):
    """logprob fp32 [T]; entropy fp32 [T] (nats) or None."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None


class _Scores(NamedTuple):
    """What the operator gives for each row: the results, and what a backward needs to compute the row again."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    state: torch.Tensor
    cut: torch.Tensor
    cut_index: torch.Tensor


def _scores(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    with_entropy: bool,
) -> _Scores:
    """Over a whole vocabulary."""
    logprob = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(logprob) if with_entropy else None
    state = torch.empty((hidden.shape[0], 2), dtype=torch.float32, device=hidden.device)
    found = _Scores(logprob, entropy, state, torch.empty_like(logprob), torch.empty_like(targets))
    ops.selected_logprob(hidden, w, targets, temperature, top_p, top_k, *found)
    return found


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
        found = _scores(hidden, w, targets, temperature, top_p, top_k, with_entropy)
        ctx.save_for_backward(hidden, w, targets, temperature, found.state, found.cut, found.cut_index)
        ctx.weight = w
        if found.entropy is not None:
            ctx.mark_non_differentiable(found.entropy)
        return found.logprob, found.entropy

    @staticmethod
    def backward(ctx: Any, dlogprob: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, w, *rest = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad = WeightGrad(ctx.weight) if ctx.needs_input_grad[1] else None
        ops.selected_logprob_backward(
            hidden, w, *rest, w.shape[0], 0, 1, dlogprob.contiguous(), dhidden, None if grad is None else grad.buffer
        )
        return (
            None if dhidden is None else dhidden.to(hidden.dtype),
            None if grad is None else grad.result(),
            *[None] * 5,
        )


class _ShardedLogprob(torch.autograd.Function):
    """The same over a vocabulary that the ranks of a group share. Every rank gets the whole result and gradient.

    Where a row is filtered, its cut depends on all logits: the ranks gather the head, and each scores all rows.
    """

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
        vocabulary: int,
        group: dist.ProcessGroup,
    ) -> Any:
        share = (vocabulary, dist.get_rank(group), dist.get_world_size(group))
        if bool((top_p != 1).any()) or bool((top_k != 0).any()):
            head = _whole_head(w, vocabulary, group)
            found = _scores(hidden, head, targets, temperature, top_p, top_k, with_entropy)
        else:
            found = _merged_scores(hidden, w, targets, temperature, with_entropy, share, group)
        ctx.save_for_backward(hidden, w, targets, temperature, found.state, found.cut, found.cut_index)
        ctx.weight, ctx.share, ctx.group = w, share, group
        if found.entropy is not None:
            ctx.mark_non_differentiable(found.entropy)
        return found.logprob, found.entropy

    @staticmethod
    def backward(ctx: Any, dlogprob: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, w, *rest = ctx.saved_tensors
        dhidden = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad = WeightGrad(ctx.weight) if ctx.needs_input_grad[1] else None
        ops.selected_logprob_backward(
            hidden, w, *rest, *ctx.share, dlogprob.contiguous(), dhidden, None if grad is None else grad.buffer
        )
        if dhidden is not None:
            dhidden = tree_all_reduce(dhidden, ctx.group).to(hidden.dtype)
        return dhidden, None if grad is None else grad.result(), *[None] * 7


def _merged_scores(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    with_entropy: bool,
    share: tuple[int, int, int],
    group: dist.ProcessGroup,
) -> _Scores:
    """Without filters: every rank's segment sums, merged as R6's tree. ``share``: (vocabulary, rank, ranks)."""
    vocabulary, _, ranks = share
    rows = hidden.shape[0]
    sums = torch.empty((rows, VOCAB_SEGMENTS // ranks, 3), dtype=torch.float32, device=hidden.device)
    hit = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    ops.logprob_segments(hidden, w, targets, temperature, *share, with_entropy, sums, hit)
    all_sums, all_hits = _gathered(sums, group), _gathered(hit, group)
    logprob = torch.empty_like(hit)
    entropy = torch.empty_like(hit) if with_entropy else None
    state = torch.empty((rows, 2), dtype=torch.float32, device=hidden.device)
    width = -(-vocabulary // VOCAB_SEGMENTS)
    owner = targets // (width * (VOCAB_SEGMENTS // ranks))  # the rank that holds each target's row of the head
    hit = torch.stack(all_hits).gather(0, owner[None])[0]
    ops.logprob_merge(torch.cat(all_sums, 1), hit, logprob, entropy, state)
    return _Scores(logprob, entropy, state, torch.full_like(temperature, -torch.inf), torch.zeros_like(targets))


def _whole_head(w: torch.Tensor, vocabulary: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The head from every rank's share of its rows; only the last shares may be short, or empty."""
    widest = vocabulary_share(vocabulary, 0, dist.get_world_size(group)).stop
    padded = w.new_zeros(widest, w.shape[1])
    padded[: w.shape[0]] = w.detach()
    return torch.cat(_gathered(padded, group))[:vocabulary]


def vocabulary_share(vocabulary: int, rank: int, ranks: int) -> slice:
    """The rows of the output head that a rank holds: its neighbouring eighths of ``ceil(vocabulary / 8)`` rows (R6).

    Raises ValueError unless ranks is 1, 2, 4 or 8.
    """
    check(ranks in (1, 2, 4, 8) and 0 <= rank < ranks, "vocabulary_share", f"rank {rank} of {ranks}; ranks: 1, 2, 4, 8")
    width, held = -(-vocabulary // VOCAB_SEGMENTS), VOCAB_SEGMENTS // ranks
    return slice(min(rank * held * width, vocabulary), min((rank + 1) * held * width, vocabulary))


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """x of every rank, in rank order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def selected_logprob(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    top_p: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    vocabulary: int | None = None,
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
        group, vocabulary: the ranks (1, 2, 4 or 8) that share the head of a vocabulary of that size, each with the rows
            of :func:`vocabulary_share`. Bits do not depend on their number. Where a filter is on, the ranks gather the
            head for the forward.

    Returns:
        :class:`SelectedLogprob`; the same bits as :func:`logprob_from_logits` and :func:`sample` on the same rows.
        A target outside the kept set gets -inf.

    Raises:
        ValueError: unsupported dtype or shape. RuntimeError: a target outside [0, V), a temperature that is not
        positive (score greedy tokens at temperature 1), a top_p outside (0, 1].
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
    if group is not None:
        ranks = dist.get_world_size(group)
        check(vocabulary is not None, op, "a group needs vocabulary=..., the size of the whole one")
        check(VOCAB_SEGMENTS % ranks == 0, op, f"{ranks} ranks; supported: 1, 2, 4, 8")
        return SelectedLogprob(
            *_ShardedLogprob.apply(
                hidden.contiguous(), w, targets.to(torch.int64).contiguous(), t, p, k, entropy, vocabulary, group
            )
        )
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
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ops.logprob_from_logits(logits.contiguous(), targets.to(torch.int64).contiguous(), t, p, k, out, None)
    return out
