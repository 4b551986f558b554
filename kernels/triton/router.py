"""The router's choice, its weights and their gradient (R8, R9). Cross-device: the bits of ``kernels/cpu/moe.cpp``.

The choice compares integers: a score's order as an int32 in the upper half of an int64, in the lower half the index,
counted down. The largest such *ticket* is the highest score at the lowest index, whoever takes the maximum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import check_distinct, check_index
from ._math import LANES, LOG2E, exp, exp2, fold, launch_options
from .moe_config import router_config

MAX_EXPERTS = 1024
_INF = tl.constexpr(float("inf"))
_LAST = tl.constexpr(0x7FFFFFFF)
_NEVER = tl.constexpr(-(2**63))


@triton.jit
def _row_sum(logits_ptr, row, real, experts, ROWS: tl.constexpr):
    """Softmax's exact maximum and R3 sum of exp(z - maximum) of each row."""
    lane = tl.arange(0, LANES)[None, :]
    at = logits_ptr + row[:, None] * experts + lane
    highest = tl.full((ROWS, LANES), -_INF, tl.float32)
    for start in range(0, experts, LANES):
        z = tl.load(at + start, mask=real[:, None] & (start + lane < experts), other=-_INF)
        highest = tl.where(z > highest, z, highest)
    m = tl.max(highest, axis=1)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, experts, LANES):
        mask = real[:, None] & (start + lane < experts)
        e = exp(tl.load(at + start, mask=mask, other=0.0) - m[:, None])
        total = tl.where(mask, total + e, total)
    return m, fold(total, ROWS, LANES)


@triton.jit
def _scores(z, m, total, SIGMOID: tl.constexpr):
    """Scores of logits of any shape; softmax by its row's maximum and sum, which the sigmoid does not look at."""
    if SIGMOID:
        one = tl.full(z.shape, 1.0, tl.float32)
        return tl.div_rn(one, one + exp2(z * -LOG2E))
    else:
        return tl.div_rn(exp(z - m), tl.broadcast_to(total, z.shape))


@triton.jit
def _key(x):
    """Integers in the order of the floats, both zeros equal, NaN below every number and above the lowest integer."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & _LAST), -_LAST)


@triton.jit
def _score_of(ticket):
    """The score whose order a ticket holds, -0 as +0."""
    key = (ticket >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _ticket(key, index):
    return (key.to(tl.int64) << 32) | (_LAST - index)


@triton.jit
def _index_of(ticket):
    return _LAST - (ticket & _LAST).to(tl.int32)


@triton.jit
def _limit_groups(ticket, groups, keep, judges, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Tickets [ROWS, GROUPS, members], those outside the ``keep`` best groups lowered to _NEVER.

    A group is judged by the sum of its ``judges`` best scores, added in descending order.
    """
    group = tl.arange(0, GROUPS)[None, :]
    rest = ticket
    judged = tl.zeros((ROWS, GROUPS), tl.float32)
    for _ in range(0, judges):
        best = tl.max(rest, axis=2)
        judged = judged + _score_of(best)
        rest = tl.where(rest == best[:, :, None], _NEVER, rest)
    left = tl.where(group < groups, _ticket(_key(judged), group), _NEVER)
    for _ in range(0, keep):
        left = tl.where(left == tl.max(left, axis=1)[:, None], _NEVER, left)
    kept = (left == _NEVER) & (group < groups)
    return tl.where(kept[:, :, None], ticket, _NEVER)


@triton.jit
def _tickets(
    logits_ptr,
    bias_ptr,
    row,
    real,
    m,
    total,
    experts,
    groups,
    keep,
    judges,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """What the experts of each row compete with, [ROWS, GROUPS SIZE]; places past a group's or the row's end do not."""
    size = experts // groups
    group = tl.arange(0, GROUPS)[None, :, None]
    member = tl.arange(0, SIZE)[None, None, :]
    index = group * size + member
    here = (group < groups) & (member < size)
    mask = real[:, None, None] & here
    z = tl.load(logits_ptr + row[:, None, None] * experts + index, mask=mask, other=0.0)
    score = _scores(z, m[:, None, None], total[:, None, None], SIGMOID)
    if BIAS:
        score = score + tl.load(bias_ptr + index, mask=here, other=0.0)
    ticket = tl.where(here, _ticket(_key(score), index), _NEVER)
    if GROUPS > 1:
        ticket = _limit_groups(ticket, groups, keep, judges, ROWS, GROUPS)
    return tl.reshape(ticket, (ROWS, GROUPS * SIZE))


@triton.jit
def router_topk_kernel(
    logits_ptr,
    bias_ptr,
    weight_ptr,
    index_ptr,
    rows,
    experts,
    k,
    groups,
    keep,
    judges,
    scale,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    REPLAY: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """ROWS tokens: the best k experts, or those that index holds (REPLAY), and their weights."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    slot = tl.arange(0, SLOTS)[None, :]
    m = tl.zeros((ROWS,), tl.float32)
    total = m
    if not SIGMOID:
        m, total = _row_sum(logits_ptr, row, real, experts, ROWS)
    if not REPLAY:
        ticket = _tickets(
            logits_ptr, bias_ptr, row, real, m, total, experts, groups, keep, judges, SIGMOID, BIAS, ROWS, GROUPS, SIZE
        )
    choice = tl.zeros((ROWS, SLOTS), tl.int32)
    chosen = tl.zeros((ROWS, SLOTS), tl.float32)
    chosen_sum = tl.zeros((ROWS,), tl.float32)
    for i in range(0, k):
        if REPLAY:
            index = tl.load(index_ptr + row * k + i, mask=real, other=0).to(tl.int32)
        else:
            best = tl.max(ticket, axis=1)
            ticket = tl.where(ticket == best[:, None], _NEVER, ticket)
            index = _index_of(best)
        score = _scores(tl.load(logits_ptr + row * experts + index, mask=real, other=0.0), m, total, SIGMOID)
        chosen_sum = chosen_sum + score
        choice = tl.where(slot == i, index[:, None], choice)
        chosen = tl.where(slot == i, score[:, None], chosen)
    if RENORMALIZE:
        chosen = tl.div_rn(chosen, tl.broadcast_to(chosen_sum[:, None], (ROWS, SLOTS)))
    at = row[:, None] * k + slot
    mask = real[:, None] & (slot < k)
    tl.store(weight_ptr + at, chosen * scale, mask=mask)
    if not REPLAY:
        tl.store(index_ptr + at, choice.to(tl.int64), mask=mask)


@triton.jit
def router_topk_backward_kernel(
    logits_ptr,
    index_ptr,
    dweight_ptr,
    dlogits_ptr,
    rows,
    experts,
    k,
    scale,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """ROWS tokens: dlogits with the choice held constant. Chains run over slots; g is 0 for experts not chosen."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    expert = tl.arange(0, EXPERTS)[None, :]
    m = tl.zeros((ROWS,), tl.float32)
    total = m
    if not SIGMOID:
        m, total = _row_sum(logits_ptr, row, real, experts, ROWS)
    chosen_sum = tl.zeros((ROWS,), tl.float32)
    for i in range(0, k):
        chosen_sum = chosen_sum + _chosen(logits_ptr, index_ptr, row, real, experts, k, i, m, total, SIGMOID)[1]
    dot = tl.zeros((ROWS,), tl.float32)
    if RENORMALIZE:
        for i in range(0, k):
            score = _chosen(logits_ptr, index_ptr, row, real, experts, k, i, m, total, SIGMOID)[1]
            g = tl.load(dweight_ptr + row * k + i, mask=real, other=0.0) * scale
            dot = tl.fma(g, tl.div_rn(score, chosen_sum), dot)
    spread = tl.zeros((ROWS, EXPERTS), tl.float32)
    named = tl.zeros((ROWS, EXPERTS), tl.int32)
    mean = tl.zeros((ROWS,), tl.float32)
    for i in range(0, k):
        index, score = _chosen(logits_ptr, index_ptr, row, real, experts, k, i, m, total, SIGMOID)
        g = tl.load(dweight_ptr + row * k + i, mask=real, other=0.0) * scale
        if RENORMALIZE:
            g = tl.div_rn(g - dot, chosen_sum)
        mean = tl.fma(g, score, mean)
        spread = tl.where(expert == index[:, None], g[:, None], spread)
        named = tl.where(expert == index[:, None], 1, named)
    at = row[:, None] * experts + expert
    mask = real[:, None] & (expert < experts)
    p = _scores(tl.load(logits_ptr + at, mask=mask, other=0.0), m[:, None], total[:, None], SIGMOID)
    by_sigmoid = tl.where(named == 1, spread * (p * (1.0 - p)), 0.0)
    tl.store(dlogits_ptr + at, by_sigmoid if SIGMOID else p * (spread - mean[:, None]), mask=mask)


@triton.jit
def _chosen(logits_ptr, index_ptr, row, real, experts, k, slot, m, total, SIGMOID: tl.constexpr):
    """(expert, its score) in one slot of each row."""
    index = tl.load(index_ptr + row * k + slot, mask=real, other=0)
    z = tl.load(logits_ptr + row * experts + index, mask=real, other=0.0)
    return index, _scores(z, m, total, SIGMOID)


def router_topk(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    sigmoid: bool,
    groups: int,
    keep_groups: int,
    judges: int,
    renormalize: bool,
    scale: float,
    replay: bool,
    weight: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """``zerokl::router_topk``: logits fp32 [T, E], bias fp32 [E], weight fp32 and index int64 [T, k]."""
    (rows, experts), k = logits.shape, index.shape[1]
    _check_experts(experts)
    if replay:
        check_index("router_topk", index, experts)
        check_distinct("router_topk", index)
    if rows:
        config = router_config(rows)
        size = experts // groups
        router_topk_kernel[(triton.cdiv(rows, config.rows),)](
            logits,
            logits if bias is None else bias,
            weight,
            index,
            rows,
            experts,
            k,
            groups,
            keep_groups,
            min(judges, size),
            scale,
            SIGMOID=sigmoid,
            BIAS=bias is not None,
            RENORMALIZE=renormalize,
            REPLAY=replay,
            ROWS=config.rows,
            GROUPS=triton.next_power_of_2(groups),
            SIZE=triton.next_power_of_2(size),
            SLOTS=triton.next_power_of_2(k),
            **launch_options(config.num_warps),
        )


def router_topk_backward(
    logits: torch.Tensor,
    index: torch.Tensor,
    dweight: torch.Tensor,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    dlogits: torch.Tensor,
) -> None:
    """``zerokl::router_topk_backward``: logits, dlogits fp32 [T, E], index int64 and dweight fp32 [T, k]."""
    (rows, experts), k = logits.shape, index.shape[1]
    _check_experts(experts)
    if rows:
        config = router_config(rows)
        router_topk_backward_kernel[(triton.cdiv(rows, config.rows),)](
            logits,
            index,
            dweight,
            dlogits,
            rows,
            experts,
            k,
            scale,
            SIGMOID=sigmoid,
            RENORMALIZE=renormalize,
            ROWS=config.rows,
            EXPERTS=triton.next_power_of_2(experts),
            **launch_options(config.num_warps),
        )


def _check_experts(experts: int) -> None:
    """A program holds a token's row in registers."""
    if experts > MAX_EXPERTS:
        raise ValueError(f"zerokl::router_topk: {experts} experts; supported on CUDA: 1 to {MAX_EXPERTS}")
