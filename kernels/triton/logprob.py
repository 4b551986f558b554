"""Log-probabilities of rows of fp32 logits (R6) and their gradient (R9). Cross-device: the bits of ``kernels/cpu``.

A row is cut into contract.VOCAB_SEGMENTS segments. ``segment_sum_kernel`` gives each one's (maximum, sum, moment),
``merge_kernel`` adds them as a balanced tree. Top-p and top-k are a *cut*: (value, index) of the last entry kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import contract
from ._check import check_index
from ._math import LANES, LN2, exp, fold, launch_options, log2, to_bf16
from .linear import matmul
from .logprob_config import elementwise_config, rows_at_once, segment_config

SEGMENTS = tl.constexpr(contract.VOCAB_SEGMENTS)
_INF = tl.constexpr(float("inf"))


class Filter(NamedTuple):
    """What turns logits into z: temperature fp32 [T]; value fp32 [T] and index int64 [T] of the last entry kept."""

    temperature: torch.Tensor
    cut: torch.Tensor
    cut_index: torch.Tensor

    @staticmethod
    def of(temperature: torch.Tensor, vocab: int) -> Filter:
        """Temperature alone."""
        return Filter(
            temperature,
            torch.full_like(temperature, -float("inf")),
            torch.full_like(temperature, vocab, dtype=torch.int64),
        )


@triton.jit
def load_z(logits_ptr, at, index, mask, temperature, cut, cut_index):
    """Logits over temperature; what lies behind the cut in the order (z descending, index ascending) is -inf."""
    z = tl.div_rn(tl.load(logits_ptr + at, mask=mask, other=-_INF), temperature)
    return tl.where((z < cut) | ((z == cut) & (index > cut_index)), -_INF, z)


@triton.jit
def segment_sum_kernel(
    logits_ptr,
    temperature_ptr,
    cut_ptr,
    cut_index_ptr,
    target_ptr,
    hit_ptr,
    sums_ptr,
    rows,
    row_stride,
    vocab,
    width,
    first_segment,
    MOMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (row block, segment): sums [rows, SEGMENTS, 3] = maximum, R3 sum of e = exp(z - maximum), moment of e.

    ``logits_ptr`` starts at the first column of ``first_segment``. A segment without a finite maximum counts nothing.
    The program whose segment holds a row's target stores its z in hit [rows].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    segment = first_segment + tl.program_id(1)
    begin = segment * width
    count = tl.minimum(begin + width, vocab) - begin
    base = row * row_stride + tl.program_id(1) * width
    real = row < rows
    temperature = tl.broadcast_to(tl.load(temperature_ptr + row, mask=real, other=1.0), (ROWS, LANES))
    cut = tl.load(cut_ptr + row, mask=real, other=0.0)
    cut_index = tl.load(cut_index_ptr + row, mask=real, other=0)

    highest = tl.full((ROWS, LANES), -_INF, tl.float32)
    nan = tl.zeros((ROWS, LANES), tl.int32)
    for start in range(0, count, LANES):
        i = start + lane
        z = load_z(logits_ptr, base + i, begin + i, real & (i < count), temperature, cut, cut_index)
        highest = tl.where(z > highest, z, highest)
        nan = tl.where(z == z, nan, 1)
    m = tl.max(highest, axis=1)

    total = tl.zeros((ROWS, LANES), tl.float32)
    moments = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, count, LANES):
        i = start + lane
        mask = real & (i < count)
        x = load_z(logits_ptr, base + i, begin + i, mask, temperature, cut, cut_index) - m[:, None]
        e = exp(x)
        total = tl.where(mask, total + e, total)
        if MOMENT:
            moments = tl.where(mask & (e > 0.0), tl.fma(e, x, moments), moments)
    empty = m == -_INF
    nothing = tl.where(tl.max(nan, axis=1) > 0, float("nan"), 0.0)

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    out = sums_ptr + (row * SEGMENTS + segment) * 3
    tl.store(out, m, mask=row < rows)
    tl.store(out + 1, tl.where(empty, nothing, fold(total, ROWS, LANES)), mask=row < rows)
    if MOMENT:
        tl.store(out + 2, tl.where(empty, 0.0, fold(moments, ROWS, LANES)), mask=row < rows)
    else:
        tl.store(out + 2, tl.zeros((ROWS,), tl.float32), mask=row < rows)
    i = tl.load(target_ptr + row, mask=row < rows, other=-1) - begin
    here = (row < rows) & (i >= 0) & (i < count)
    z = load_z(
        logits_ptr,
        row * row_stride + tl.program_id(1) * width + i,
        begin + i,
        here,
        tl.load(temperature_ptr + row, mask=row < rows, other=1.0),
        tl.load(cut_ptr + row, mask=row < rows, other=0.0),
        tl.load(cut_index_ptr + row, mask=row < rows, other=0),
    )
    tl.store(hit_ptr + row, z, mask=here)


@triton.jit
def _weigh(m, s, moment, top):
    """One side of a merge: (sum, moment) shifted to the maximum ``top``. A side that holds nothing adds nothing."""
    d = m - top
    e = tl.where(m == -_INF, 0.0, exp(d))
    return s * e, tl.where(e == 0.0, 0.0, e * tl.fma(s, d, moment))


@triton.jit
def _merge(m, s, moment, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The balanced tree over neighbours: [ROWS, COLUMNS] to [ROWS]."""
    pairs: tl.constexpr = COLUMNS // 2
    m1, m2 = tl.split(tl.reshape(m, (ROWS, pairs, 2)))
    s1, s2 = tl.split(tl.reshape(s, (ROWS, pairs, 2)))
    o1, o2 = tl.split(tl.reshape(moment, (ROWS, pairs, 2)))
    top = tl.where(m2 > m1, m2, m1)
    a, a_moment = _weigh(m1, s1, o1, top)
    b, b_moment = _weigh(m2, s2, o2, top)
    total = tl.where((s1 != s1) | (s2 != s2), float("nan"), a + b)
    if pairs == 1:
        return tl.reshape(top, (ROWS,)), tl.reshape(total, (ROWS,)), tl.reshape(a_moment + b_moment, (ROWS,))
    else:
        return _merge(top, total, a_moment + b_moment, ROWS, pairs)


@triton.jit
def merge_kernel(
    sums_ptr, hit_ptr, logprob_ptr, entropy_ptr, state_ptr, rows, ENTROPY: tl.constexpr, ROWS: tl.constexpr
):
    """logprob = (z_t - M) - ln(s); entropy = ln(s) - moment / s; state [rows, 2] = M, s."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    at = sums_ptr + (row[:, None] * SEGMENTS + tl.arange(0, SEGMENTS)[None, :]) * 3
    m, s, moment = _merge(
        tl.load(at, mask=mask[:, None], other=0.0),
        tl.load(at + 1, mask=mask[:, None], other=1.0),
        tl.load(at + 2, mask=mask[:, None], other=0.0),
        ROWS,
        SEGMENTS,
    )
    log_sum = log2(s) * LN2
    tl.store(logprob_ptr + row, (tl.load(hit_ptr + row, mask=mask, other=0.0) - m) - log_sum, mask=mask)
    tl.store(state_ptr + row * 2, m, mask=mask)
    tl.store(state_ptr + row * 2 + 1, s, mask=mask)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_sum - tl.div_rn(moment, s), mask=mask)


@triton.jit
def scale_kernel(logits_ptr, temperature_ptr, z_ptr, vocab, BLOCK: tl.constexpr):
    """z = logits / temperature with -0 made +0, so that any sort sees the two zeros as equals."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * vocab + i, mask=i < vocab, other=0.0)
    z = tl.div_rn(logits, tl.broadcast_to(tl.load(temperature_ptr + row), (BLOCK,)))
    tl.store(z_ptr + row * vocab + i, z + 0.0, mask=i < vocab)


@triton.jit
def cut_kernel(z_ptr, order_ptr, state_ptr, top_p_ptr, top_k_ptr, cut_ptr, cut_index_ptr, vocab):
    """Program (row): walks z in descending order, adding mass in fp32, to the last entry that top-p and top-k keep."""
    row = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    m = tl.load(state_ptr + row * 2 + one)
    total = tl.load(state_ptr + row * 2 + 1)
    top_p = tl.load(top_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    tl.store(cut_ptr + row, -_INF)
    tl.store(cut_index_ptr + row, tl.cast(vocab, tl.int64))
    by_mass = top_p < 1.0
    filters = by_mass | ((top_k > 0) & (top_k < vocab))
    if filters & (total == total):
        most = tl.where(top_k > 0, tl.minimum(top_k, vocab), vocab)
        limit = top_p * total
        mass = tl.zeros((1,), tl.float32)
        rank = 0
        more = most > 0
        while more:
            mass += exp(tl.load(z_ptr + row * vocab + rank + one) - m)
            rank += 1
            more = (rank < most) & ((not by_mass) | (tl.max(tl.where(mass < limit, 1, 0)) > 0))
        tl.store(cut_ptr + row, tl.load(z_ptr + row * vocab + rank - 1))
        tl.store(cut_index_ptr + row, tl.load(order_ptr + row * vocab + rank - 1))


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


def segment_width(vocab: int) -> int:
    """Columns of one segment; the last ones may be shorter or empty."""
    return triton.cdiv(vocab, contract.VOCAB_SEGMENTS)


def merge(
    sums: torch.Tensor, hit: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor | None, state: torch.Tensor
) -> None:
    """Fill logprob, entropy and state [rows, 2] from sums [rows, SEGMENTS, 3] and hit [rows]."""
    rows = logprob.shape[0]
    merge_kernel[(triton.cdiv(rows, 16),)](
        sums,
        hit,
        logprob,
        logprob if entropy is None else entropy,
        state,
        rows,
        ENTROPY=entropy is not None,
        ROWS=16,
        **launch_options(1),
    )


class Scores:
    """Segment sums of rows as they arrive, and what they merge to. ``hit`` is 0 until the target's segment arrives."""

    def __init__(self, targets: torch.Tensor, vocab: int) -> None:
        rows, device = targets.shape[0], targets.device
        self._targets, self._vocab = targets, vocab
        self.sums = torch.empty((rows, contract.VOCAB_SEGMENTS, 3), dtype=torch.float32, device=device)
        self.hit = torch.zeros(rows, dtype=torch.float32, device=device)
        self.state = torch.empty((rows, 2), dtype=torch.float32, device=device)

    def add(self, logits: torch.Tensor, filter: Filter, first_segment: int, segments: int, moment: bool) -> None:
        """Logits fp32 [T, columns] of ``segments`` segments from ``first_segment`` on."""
        rows = logits.shape[0]
        config = segment_config(rows)
        segment_sum_kernel[triton.cdiv(rows, config.rows), segments](
            logits,
            *filter,
            self._targets,
            self.hit,
            self.sums,
            rows,
            logits.stride(0),
            self._vocab,
            segment_width(self._vocab),
            first_segment,
            MOMENT=moment,
            ROWS=config.rows,
            **launch_options(config.num_warps, config.num_stages),
        )

    def add_head(
        self, hidden: torch.Tensor, w: torch.Tensor, held: range, filter: Filter, logits: torch.Tensor, moment: bool
    ) -> None:
        """Logits of hidden bf16 [T, H], one segment at a time in scratch; w holds the rows of the segments ``held``."""
        rows, width = hidden.shape[0], segment_width(self._vocab)
        for i, segment in enumerate(held):
            columns = w[i * width : (i + 1) * width]
            z = logits[: rows * columns.shape[0]].view(rows, columns.shape[0])
            matmul(hidden, columns.t(), z)
            self.add(z, filter, segment, 1, moment)

    def merge(self, logprob: torch.Tensor, entropy: torch.Tensor | None) -> None:
        """Fill logprob, entropy and ``state``."""
        merge(self.sums, self.hit, logprob, entropy, self.state)


def score(
    logits: torch.Tensor, targets: torch.Tensor, filter: Filter, logprob: torch.Tensor, entropy: torch.Tensor | None
) -> torch.Tensor:
    """Log-probabilities of whole rows of logits; returns the state."""
    scores = Scores(targets, logits.shape[1])
    scores.add(logits, filter, 0, contract.VOCAB_SEGMENTS, entropy is not None)
    scores.merge(logprob, entropy)
    return scores.state


def find_filter(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> Filter:
    """The cut of every row. Asks the device whether any row filters at all: one synchronisation."""
    rows, vocab = logits.shape
    plain = Filter.of(temperature, vocab)
    if not filters(top_p, top_k, vocab):
        return plain
    targets = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    state = score(logits, targets, plain, torch.empty_like(temperature), None)
    config = elementwise_config()
    z = torch.empty_like(logits)
    scale_kernel[rows, triton.cdiv(vocab, config.block)](
        logits, temperature, z, vocab, BLOCK=config.block, **launch_options(config.num_warps)
    )
    # a stable sort of a total order: its result does not depend on the algorithm
    z, order = torch.sort(z, dim=1, descending=True, stable=True)
    cut_kernel[(rows,)](z, order, state, top_p, top_k, plain.cut, plain.cut_index, vocab, **launch_options(1))
    return plain


def filters(top_p: torch.Tensor, top_k: torch.Tensor, vocab: int) -> bool:
    """Whether any row drops anything."""
    return bool(((top_p < 1) | ((top_k > 0) & (top_k < vocab))).any())


def logprob_from_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    logprob: torch.Tensor,
    entropy: torch.Tensor | None,
) -> None:
    """``zerokl::logprob_from_logits``: logits fp32 [T, V]; targets int64, the others fp32 or int32 [T]."""
    if logits.shape[0] == 0:
        return
    check_index("logprob_from_logits", targets, logits.shape[1])
    score(logits, targets, find_filter(logits, temperature, top_p, top_k), logprob, entropy)


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
            scores.add_head(hidden[part], w, held, filter, logits, entropy is not None)
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
        scores.add_head(hidden[part], w, held, Filter.of(temperature[part], total), logits, moment)
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
