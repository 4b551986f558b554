"""Counter-based Gumbel-max sampling (R0, R6). Cross-device: the bits of ``kernels/cpu``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import contract
from ._math import LN2, launch_options, log2, mix
from .logprob import SEGMENTS, Filter, find_filter, load_z, score, segment_width
from .logprob_config import elementwise_config

_INF = tl.constexpr(float("inf"))


@triton.jit
def _first_highest(value, index):
    """(largest value, lowest index among equals) of a vector without NaN."""
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, index, 0x7FFFFFFF), axis=0)


@triton.jit
def draw_kernel(
    logits_ptr,
    temperature_ptr,
    cut_ptr,
    cut_index_ptr,
    greedy_ptr,
    seed_ptr,
    position_ptr,
    best_ptr,
    where_ptr,
    vocab,
    width,
    BLOCK: tl.constexpr,
):
    """Program (row, segment): the first index of the largest z - ln(-log2 u); of the largest z in a greedy row.

    NaN never wins. Indices have 32 bits, like the counter that is hashed.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * width
    end = tl.minimum(begin + width, vocab)
    temperature = tl.broadcast_to(tl.load(temperature_ptr + row), (BLOCK,))
    cut = tl.load(cut_ptr + row)
    cut_index = tl.load(cut_index_ptr + row)
    greedy = tl.load(greedy_ptr + row) != 0
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    key = mix(seed.to(tl.uint32) ^ 0x9E3779B9)
    key = mix(key ^ (seed >> 32).to(tl.uint32))
    key = mix(key ^ position.to(tl.uint32))
    key = mix(key ^ (position >> 32).to(tl.uint32))
    best = tl.full((BLOCK,), -_INF, tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        z = load_z(logits_ptr, row * vocab + i, i, i < end, temperature, cut, cut_index)
        h = mix(mix(i.to(tl.uint32) * 0x9E3779B9 + key) ^ key) >> 9
        u = (h.to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        z = tl.where(greedy, z, z - log2(-log2(u)) * LN2)
        better = (z > best) & (i < end)
        best = tl.where(better, z, best)
        where = tl.where(better, i, where)
    value, index = _first_highest(best, where)
    tl.store(best_ptr + row * SEGMENTS + tl.program_id(1), value)
    tl.store(where_ptr + row * SEGMENTS + tl.program_id(1), index)


@triton.jit
def choose_kernel(best_ptr, where_ptr, token_ptr):
    """Program (row): the winner among the segments' winners."""
    row = tl.program_id(0).to(tl.int64)
    at = row * SEGMENTS + tl.arange(0, SEGMENTS)
    _, index = _first_highest(tl.load(best_ptr + at), tl.load(where_ptr + at))
    tl.store(token_ptr + row, index.to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    token: torch.Tensor,
    logprob: torch.Tensor,
    raw_logprob: torch.Tensor,
) -> None:
    """``zerokl::sample``: logits fp32 [T, V]; token int64 [T], both log-probabilities fp32 [T]."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    greedy = temperature == 0
    ones = torch.ones_like(temperature)
    # a greedy row ignores its filters and reports the raw log-probability
    filter = find_filter(
        logits,
        torch.where(greedy, ones, temperature),
        torch.where(greedy, ones, top_p),
        torch.where(greedy, torch.zeros_like(top_k), top_k),
    )
    shape = (rows, contract.VOCAB_SEGMENTS)
    best = torch.empty(shape, dtype=torch.float32, device=logits.device)
    where = torch.empty(shape, dtype=torch.int32, device=logits.device)
    config = elementwise_config()
    options = launch_options(config.num_warps)
    draw_kernel[shape](
        logits,
        *filter,
        greedy.to(torch.int32),
        seed,
        position,
        best,
        where,
        vocab,
        segment_width(vocab),
        BLOCK=config.block,
        **options,
    )
    choose_kernel[(rows,)](best, where, token, **launch_options(1))
    score(logits, token, filter, logprob, None)
    score(logits, token, Filter.of(ones, vocab), raw_logprob, None)
