"""The output head fused with log-probabilities (R6, R9): no [T, V] tensor of logits, whole or shared by ranks.

Logits come and go by blocks of rows and segments of the vocabulary. They are matrix products, so their bits are those
of profile ``sm90-bf16``; from logits on everything is cross-device (``logprob.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
from ._check import check_index
from ._math import exp, launch_options, to_bf16
from .linear import matmul
from .logprob import Filter, Scores, filters, find_filter, load_z, merge, segment_width
from .logprob_config import elementwise_config, rows_at_once


@triton.jit
def gradient_kernel(
    logits_ptr,
    temperature_ptr,
    cut_ptr,
    cut_index_ptr,
    target_ptr,
    state_ptr,
    grad_ptr,
    dz_ptr,
    first,
    count,
    BLOCK: tl.constexpr,
):
    """Program (row, column block): dz [rows, count] = RNE((g (1[target] - exp(z - M) / s)) / temperature)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    temperature = tl.broadcast_to(tl.load(temperature_ptr + row), (BLOCK,))
    cut = tl.load(cut_ptr + row)
    cut_index = tl.load(cut_index_ptr + row)
    z = load_z(logits_ptr, row * count + i, first + i, mask, temperature, cut, cut_index)
    s = tl.broadcast_to(tl.load(state_ptr + row * 2 + 1), (BLOCK,))
    p = tl.div_rn(exp(z - tl.load(state_ptr + row * 2)), s)
    hit = tl.where(first + i == tl.load(target_ptr + row), 1.0, 0.0)
    dz = tl.div_rn(tl.load(grad_ptr + row) * (hit - p), temperature)
    tl.store(dz_ptr + row * count + i, to_bf16(dz), mask=mask)


def _add_head(
    scores: Scores,
    hidden: torch.Tensor,
    w: torch.Tensor,
    held: range,
    filter: Filter,
    logits: torch.Tensor,
    moment: bool,
) -> None:
    """Logits of hidden bf16 [T, H], one segment at a time in scratch; w holds the rows of the segments ``held``."""
    rows, width = hidden.shape[0], segment_width(scores.vocab)
    for i, segment in enumerate(held):
        columns = w[i * width : (i + 1) * width]
        z = logits[: rows * columns.shape[0]].view(rows, columns.shape[0])
        matmul(hidden, columns.t(), z)
        scores.add(z, filter, segment, 1, moment)


def selected_logprob(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    logprob: torch.Tensor,
    entropy: torch.Tensor | None,
    state: torch.Tensor,
    cut: torch.Tensor,
    cut_index: torch.Tensor,
) -> None:
    """``zerokl::selected_logprob``: hidden bf16 [T, H], w bf16 [V, H]; fills all that follows.

    Logits exist for a block of rows and one segment of the vocabulary at a time; whole rows only if one is filtered.
    """
    (rows, _), vocab = hidden.shape, w.shape[0]
    check_index("selected_logprob", targets, vocab)
    filtered = filters(top_p, top_k, vocab)
    width = segment_width(vocab)
    block = rows_at_once(vocab if filtered else width)
    logits = torch.empty(min(block, rows) * (vocab if filtered else width), dtype=torch.float32, device=hidden.device)
    for first in range(0, rows, block):
        part = slice(first, min(first + block, rows))
        count = part.stop - first
        scores = Scores(targets[part], vocab)
        if filtered:
            z = logits[: count * vocab].view(count, vocab)
            matmul(hidden[part], w.t(), z)
            filter = find_filter(z, temperature[part], top_p[part], top_k[part])
            scores.add(z, filter, 0, contract.VOCAB_SEGMENTS, entropy is not None)
        else:
            filter = Filter.of(temperature[part], vocab)
            held = range(contract.VOCAB_SEGMENTS)
            _add_head(scores, hidden[part], w, held, filter, logits, entropy is not None)
        scores.merge(logprob[part], None if entropy is None else entropy[part])
        state[part], cut[part], cut_index[part] = scores.state, filter.cut, filter.cut_index


def segments_held(w: torch.Tensor, total: int, rank: int, ranks: int) -> range:
    """The segments of a vocabulary of ``total`` whose rows are w, as R6 cuts it. ValueError unless w has those rows."""
    if ranks not in (1, 2, 4, 8) or not 0 <= rank < ranks:
        raise ValueError(f"zerokl.kernels.selected_logprob: rank {rank} of {ranks}; supported: 1, 2, 4 or 8 ranks")
    count = contract.VOCAB_SEGMENTS // ranks
    held, width = range(rank * count, (rank + 1) * count), segment_width(total)
    rows = min(held.stop * width, total) - min(held.start * width, total)
    if w.shape[0] != rows:
        raise ValueError(
            f"zerokl.kernels.selected_logprob: w has {w.shape[0]} rows; rank {rank} of {ranks} holds {rows} of a "
            f"vocabulary of {total}"
        )
    return held


def logprob_segments(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    total: int,
    rank: int,
    ranks: int,
    moment: bool,
    sums: torch.Tensor,
    hit: torch.Tensor,
) -> None:
    """``zerokl::logprob_segments``: one rank's part of selected_logprob without filters, w being its rows of the head.

    Fills sums fp32 [T, 8 / ranks, 3] and hit fp32 [T], z of the targets that lie in w and 0 elsewhere.
    """
    held = segments_held(w, total, rank, ranks)
    check_index("selected_logprob", targets, total)
    rows, width = hidden.shape[0], segment_width(total)
    block = rows_at_once(width)
    logits = torch.empty(min(block, rows) * width, dtype=torch.float32, device=hidden.device)
    for first in range(0, rows, block):
        part = slice(first, min(first + block, rows))
        scores = Scores(targets[part], total)
        _add_head(scores, hidden[part], w, held, Filter.of(temperature[part], total), logits, moment)
        sums[part], hit[part] = scores.sums[:, held.start : held.stop], scores.hit


def logprob_merge(
    sums: torch.Tensor, hit: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor | None, state: torch.Tensor
) -> None:
    """``zerokl::logprob_merge``: sums fp32 [T, 8, 3] of all ranks, hit fp32 [T] of the targets' owners."""
    if hit.shape[0]:
        merge(sums, hit, logprob, entropy, state)


def selected_logprob_backward(
    hidden: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    state: torch.Tensor,
    cut: torch.Tensor,
    cut_index: torch.Tensor,
    total: int,
    rank: int,
    ranks: int,
    grad: torch.Tensor,
    dhidden: torch.Tensor | None,
    dw: torch.Tensor | None,
) -> None:
    """``zerokl::selected_logprob_backward``: recomputes the logits by segment; fp32 dw chains over tokens from what it
    holds, fp32 dhidden over each segment's vocabulary, the segments added as a tree. Of ranks that share a vocabulary
    each adds its own segments; the ranks' trees are the caller's to add."""
    (rows, height), vocab = hidden.shape, w.shape[0]
    held = segments_held(w, total, rank, ranks)
    width = segment_width(total)
    block = rows_at_once(width)
    config = elementwise_config()
    logits = torch.empty(min(block, rows) * width, dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(min(block, rows) * width, dtype=torch.bfloat16, device=hidden.device)
    for first in range(0, rows, block):
        part = slice(first, min(first + block, rows))
        count = part.stop - first
        segments = 0 if dhidden is None else len(held)
        parts = torch.zeros((segments, count, height), dtype=torch.float32, device=hidden.device)
        for begin in range(0, vocab, width):
            columns = w[begin : begin + width]
            n = columns.shape[0]
            z, dz = logits[: count * n].view(count, n), gradient[: count * n].view(count, n)
            matmul(hidden[part], columns.t(), z)
            gradient_kernel[count, triton.cdiv(n, config.block)](
                z,
                temperature[part],
                cut[part],
                cut_index[part],
                targets[part],
                state[part],
                grad[part],
                dz,
                held.start * width + begin,
                n,
                BLOCK=config.block,
                **launch_options(config.num_warps),
            )
            if dhidden is not None:
                matmul(dz, columns, parts[begin // width])
            if dw is not None:
                matmul(dz.t(), hidden[part], dw[begin : begin + width], add=True)
        if dhidden is not None:
            while parts.shape[0] > 1:
                parts = parts[::2] + parts[1::2]  # elementwise: the same bits whoever adds
            dhidden[part] = parts[0]
