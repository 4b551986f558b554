"""Log-probabilities of rows of fp32 logits (R6). Cross-device: the bits of ``kernels/cpu``.

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
from ._math import LANES, LN2, exp, fold, launch_options, log2
from .logprob_config import elementwise_config, segment_config

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
        self._targets, self.vocab = targets, vocab
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
            self.vocab,
            segment_width(self.vocab),
            first_segment,
            MOMENT=moment,
            ROWS=config.rows,
            **launch_options(config.num_warps, config.num_stages),
        )

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
