"""The router's choice, its weights and their gradient (R8, R9). Cross-device: the bits of ``kernels/cpu/moe.cpp``.

The choice compares integers: a score's order as an int32 in the upper half of an int64, in the lower half the index,
counted down. The largest such *ticket* is the highest score at the lowest index, in whatever order maxima are taken.
A program is one warp with one token: its experts compete by shuffles, without shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._check import check_distinct, check_index
from ._math import LANES, LOG2E, exp, exp2, fold, launch_options

MAX_EXPERTS = 1024
_INF = tl.constexpr(float("inf"))
_LAST = tl.constexpr(0x7FFFFFFF)
_NEVER = tl.constexpr(-(2**63))


@triton.jit
def _row_sum(logits_ptr, experts):
    """Softmax's exact maximum and R3 sum of exp(z - maximum) of a row, [1] each."""
    lane = tl.arange(0, LANES)[None, :]
    highest = tl.full((1, LANES), -_INF, tl.float32)
    for start in range(0, experts, LANES):
        z = tl.load(logits_ptr + start + lane, mask=start + lane < experts, other=-_INF)
        highest = tl.where(z > highest, z, highest)
    m = tl.max(highest, axis=1)
    total = tl.zeros((1, LANES), tl.float32)
    for start in range(0, experts, LANES):
        mask = start + lane < experts
        e = exp(tl.load(logits_ptr + start + lane, mask=mask, other=0.0) - m[:, None])
        total = tl.where(mask, total + e, total)
    return m, fold(total, 1, LANES)


@triton.jit
def _scores(z, m, total, SIGMOID: tl.constexpr):
    """Scores of a row's logits [n]; softmax by the maximum and sum, which the sigmoid does not look at."""
    if SIGMOID:
        one = tl.full(z.shape, 1.0, tl.float32)
        return tl.div_rn(one, one + exp2(z * -LOG2E))
    else:
        return tl.div_rn(exp(z - m), tl.broadcast_to(total, z.shape))


@triton.jit
def _chosen(logits_ptr, index_ptr, slot, m, total, SIGMOID: tl.constexpr):
    """(expert, its score) of a slot, [1] each."""
    index = tl.load(index_ptr + slot + tl.arange(0, 1))
    return index, _scores(tl.load(logits_ptr + index), m, total, SIGMOID)


@triton.jit
def _key(x):
    """Integers in the order of the floats, NaN below every number and above the lowest integer.

    -0 does not occur: scores are not negative, what is added to them or to the +0 of a sum does not give it.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & _LAST), -_LAST)


@triton.jit
def _ticket(score, index):
    return (_key(score).to(tl.int64) << 32) | (_LAST - index)


@triton.jit
def _score_of(ticket):
    """The score that a ticket was made of."""
    key = (ticket >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(ticket):
    return _LAST - (ticket & _LAST).to(tl.int32)


@triton.jit
def _limit_groups(ticket, groups, keep, judges, GROUPS: tl.constexpr):
    """Tickets [GROUPS, members], those outside the ``keep`` best groups lowered to _NEVER.

    A group is judged by the sum of its ``judges`` best scores, added in descending order.
    """
    group = tl.arange(0, GROUPS)
    rest = ticket
    judged = tl.zeros((GROUPS,), tl.float32)
    for _ in range(0, judges):
        best = tl.max(rest, axis=1)
        judged = judged + _score_of(best)
        rest = tl.where(rest == best[:, None], _NEVER, rest)
    left = tl.where(group < groups, _ticket(judged, group), _NEVER)
    for _ in range(0, keep):
        left = tl.where(left == tl.max(left, axis=0), _NEVER, left)
    kept = (left == _NEVER) & (group < groups)
    return tl.where(kept[:, None], ticket, _NEVER)


@triton.jit
def _tickets(
    logits_ptr,
    bias_ptr,
    m,
    total,
    experts,
    groups,
    keep,
    judges,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """What a row's experts compete with, [GROUPS SIZE]; places past a group's or the row's end stand at _NEVER."""
    size = experts // groups
    place = tl.arange(0, GROUPS * SIZE)
    group = place // SIZE
    member = place % SIZE
    index = group * size + member
    here = (group < groups) & (member < size)
    score = _scores(tl.load(logits_ptr + index, mask=here, other=0.0), m, total, SIGMOID)
    if BIAS:
        score = score + tl.load(bias_ptr + index, mask=here, other=0.0)
    ticket = tl.where(here, _ticket(score, index), _NEVER)
    if GROUPS > 1:
        ticket = _limit_groups(tl.reshape(ticket, (GROUPS, SIZE)), groups, keep, judges, GROUPS)
    return tl.reshape(ticket, (GROUPS * SIZE,))


@triton.jit
def router_topk_kernel(
    logits_ptr,
    bias_ptr,
    weight_ptr,
    index_ptr,
    experts,
    slots,
    groups,
    keep,
    judges,
    scale,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    REPLAY: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program (token): the best experts, or those that index holds (REPLAY), and their weights, slot by slot.

    GROUPS, SIZE (of a group) and SLOTS are powers of two that hold what there is.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * experts
    weight_ptr += row * slots
    index_ptr += row * slots
    m = tl.zeros((1,), tl.float32)
    total = m
    if not SIGMOID:
        m, total = _row_sum(logits_ptr, experts)
    if not REPLAY:
        ticket = _tickets(logits_ptr, bias_ptr, m, total, experts, groups, keep, judges, SIGMOID, BIAS, GROUPS, SIZE)
    slot = tl.arange(0, SLOTS)
    choice = tl.zeros((SLOTS,), tl.int32)
    chosen = tl.zeros((SLOTS,), tl.float32)
    chosen_sum = tl.zeros((1,), tl.float32)
    for i in range(0, slots):
        if REPLAY:
            score = _chosen(logits_ptr, index_ptr, i, m, total, SIGMOID)[1]
        else:
            best = tl.max(ticket, axis=0)
            ticket = tl.where(ticket == best, _NEVER, ticket)
            index = _index_of(best)
            choice = tl.where(slot == i, index, choice)
            score = _scores(tl.load(logits_ptr + index + tl.arange(0, 1)), m, total, SIGMOID)
        chosen = tl.where(slot == i, score, chosen)
        chosen_sum = chosen_sum + score
    if RENORMALIZE:
        chosen = tl.div_rn(chosen, tl.broadcast_to(chosen_sum, (SLOTS,)))
    tl.store(weight_ptr + slot, chosen * scale, mask=slot < slots)
    if not REPLAY:
        tl.store(index_ptr + slot, choice.to(tl.int64), mask=slot < slots)


@triton.jit
def router_topk_backward_kernel(
    logits_ptr,
    index_ptr,
    dweight_ptr,
    dlogits_ptr,
    experts,
    slots,
    scale,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program (token): dlogits with the choice held constant. Chains run over slots; g is 0 for experts not chosen."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * experts
    index_ptr += row * slots
    dweight_ptr += row * slots
    m = tl.zeros((1,), tl.float32)
    total = m
    if not SIGMOID:
        m, total = _row_sum(logits_ptr, experts)
    one = tl.arange(0, 1)
    chosen_sum = tl.zeros((1,), tl.float32)
    dot = tl.zeros((1,), tl.float32)
    if RENORMALIZE:
        for i in range(0, slots):
            chosen_sum = chosen_sum + _chosen(logits_ptr, index_ptr, i, m, total, SIGMOID)[1]
        for i in range(0, slots):
            score = _chosen(logits_ptr, index_ptr, i, m, total, SIGMOID)[1]
            g = tl.load(dweight_ptr + i + one) * scale
            dot = tl.fma(g, tl.div_rn(score, chosen_sum), dot)
    expert = tl.arange(0, EXPERTS)
    spread = tl.zeros((EXPERTS,), tl.float32)
    named = tl.zeros((EXPERTS,), tl.int32)
    mean = tl.zeros((1,), tl.float32)
    for i in range(0, slots):
        index, score = _chosen(logits_ptr, index_ptr, i, m, total, SIGMOID)
        g = tl.load(dweight_ptr + i + one) * scale
        if RENORMALIZE:
            g = tl.div_rn(g - dot, chosen_sum)
        mean = tl.fma(g, score, mean)
        spread = tl.where(expert == index, g, spread)
        named = tl.where(expert == index, 1, named)
    p = _scores(tl.load(logits_ptr + expert, mask=expert < experts, other=0.0), m, total, SIGMOID)
    by_sigmoid = tl.where(named == 1, spread * (p * (1.0 - p)), 0.0)
    dlogits = by_sigmoid if SIGMOID else p * (spread - mean)
    tl.store(dlogits_ptr + row * experts + expert, dlogits, mask=expert < experts)


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
    (rows, experts), slots = logits.shape, index.shape[1]
    _check_experts(experts)
    if replay:
        check_index("router_topk", index, experts)
        check_distinct("router_topk", index)
    if rows:
        size = experts // groups
        router_topk_kernel[(rows,)](
            logits,
            logits if bias is None else bias,
            weight,
            index,
            experts,
            slots,
            groups,
            keep_groups,
            min(judges, size),
            scale,
            SIGMOID=sigmoid,
            BIAS=bias is not None,
            RENORMALIZE=renormalize,
            REPLAY=replay,
            GROUPS=triton.next_power_of_2(groups),
            SIZE=triton.next_power_of_2(size),
            SLOTS=triton.next_power_of_2(slots),
            **launch_options(1),
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
    (rows, experts), slots = logits.shape, index.shape[1]
    _check_experts(experts)
    if rows:
        router_topk_backward_kernel[(rows,)](
            logits,
            index,
            dweight,
            dlogits,
            experts,
            slots,
            scale,
            SIGMOID=sigmoid,
            RENORMALIZE=renormalize,
            EXPERTS=triton.next_power_of_2(experts),
            **launch_options(1),
        )


def _check_experts(experts: int) -> None:
    """A program holds a token's row in registers."""
    if experts > MAX_EXPERTS:
        raise ValueError(f"zerokl::router_topk: {experts} experts; supported on CUDA: 1 to {MAX_EXPERTS}")
