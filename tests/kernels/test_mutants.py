"""The comparison can fail: with each rule of the contract broken in the reference, some byte differs on the same data.

A mutant that survives means that the data of the suite does not exercise its rule.
"""

import sys

import numpy as np
import pytest
import torch
from data import assert_same_bits, f32, hashed, tie

from zerokl import kernels
from zerokl.kernels.ops._common import ops
from zerokl.kernels.reference import activation, arith, attention, linear, logprob, moe, norm, sampling

MODULES = (activation, arith, attention, linear, logprob, moe, norm, sampling)
F32 = np.float32


def suite() -> None:
    """One comparison for each family of ops, with the kinds of data that the other tests use."""
    x, w = hashed(5, 8 * 34, seed=1, kind="cancel"), hashed(9, 8 * 34, seed=2, kind="wide")
    for segments in (1, 4):
        y = kernels.linear(x, w, segments=segments, out_dtype=torch.float32)
        assert_same_bits(y, linear.linear(f32(x), f32(w), segments=segments, round_output=False), "linear")
    tiny, weight = hashed(3, 40, seed=3, kind="tiny"), hashed(4, 40, seed=4)
    y = kernels.linear(tiny, weight, out_dtype=torch.float32)
    assert_same_bits(y, linear.linear(f32(tiny), f32(weight), round_output=False), "subnormals")
    assert_same_bits(kernels.rms_norm(x, x[0].abs(), 1e-5), norm.rms_norm(f32(x), f32(x[0].abs()), 1e-5)[0], "rms_norm")
    assert_same_bits(kernels.silu_and_mul(x), activation.silu_and_mul(f32(x)), "silu_and_mul")
    q, k, v = (hashed(140, 1, 64, seed=s, kind=kind) * 4 for s, kind in ((5, "plain"), (6, "plain"), (7, "cancel")))
    tie(k, v)
    out, lse = torch.empty_like(q), torch.empty(140, 1)
    ops.attention_varlen(q, k, v, torch.tensor([0, 140], dtype=torch.int32), 0.01, True, 0, None, out, lse)
    for row in (0, 63, *range(64, 140, 5)):
        o, sums = attention.attend_row(f32(q[row, 0]), f32(k[:, 0]), f32(v[:, 0]), 0, row + 1, 0.01)
        assert_same_bits(out[row, 0], arith.bf16(o), "attention")
        assert_same_bits(lse[row], np.array([sums]), "log-sum-exp")
    # nearly certain targets too: log-probabilities near zero, which show the last bits of the sum
    for spread in (12, 2):
        logits = f32(hashed(60, 700, seed=8)) * F32(spread)
        targets = logits.argmax(1)
        got = kernels.logprob_from_logits(torch.from_numpy(logits), torch.from_numpy(targets))
        expected = [logprob.logprob_row(z, t)[0] for z, t in zip(logits, targets, strict=True)]
        assert_same_bits(got, np.array(expected), "logprob")
    scores = hashed(8, 24, seed=9).float() * 3
    scores[:, 1::2] = scores[:, 0::2]
    routing = kernels.router_topk(
        scores, 3, scoring="softmax", bias=hashed(24, seed=10).float().repeat_interleave(2)[:24]
    )
    bias = f32(hashed(24, seed=10).float().repeat_interleave(2)[:24])
    rows = [moe.router_row(z, 3, scoring="softmax", bias=bias) for z in f32(scores)]
    assert routing.indices.tolist() == [r[1].tolist() for r in rows], "router"
    assert_same_bits(routing.weights, np.stack([r[0] for r in rows]), "router weights")
    _, permutation = kernels.moe_permute(x, routing.indices[:5], 24)
    position = moe.permute(routing.indices[:5].numpy(), 24)[2]
    # the first two slots cancel and leave the third: any other order loses its low bits
    y, shared, mix = hashed(15, 40, seed=11), hashed(5, 40, seed=12), torch.ones(5, 3)
    y[position[:, 0]] *= 2.0**20
    y[position[:, 1]] = -y[position[:, 0]]
    together = kernels.moe_combine(y, permutation, mix, shared=shared)
    assert_same_bits(together, moe.combine(f32(y), position, f32(mix), f32(shared)), "combine")
    routed_tokens()
    gradients()


def routed_tokens() -> None:
    """A live choice, a replayed one and what they combine to, for enough tokens to see an order in bf16."""
    logits = hashed(288, 16, seed=13).float() * 4
    bias = hashed(16, seed=14).float()
    chosen = kernels.router_topk(logits, 4, scoring="sigmoid", bias=bias)
    again = kernels.router_topk(logits, 4, scoring="sigmoid", bias=bias, replay=chosen.indices)
    for routing, replay in ((chosen, None), (again, chosen.indices.numpy())):
        expected = route(f32(logits), 4, bias=f32(bias), replay=replay)
        assert routing.indices.tolist() == expected[1].tolist(), "live or replayed choice"
        assert_same_bits(routing.weights, expected[0], "live weights of the choice")
    weights, indices = route(f32(logits), 4, bias=f32(bias))
    y, shared = hashed(288 * 4, 24, seed=15), hashed(288, 24, seed=16)
    _, permutation = kernels.moe_permute(shared, chosen.indices, 16)
    out = kernels.moe_combine(y, permutation, chosen.weights, shared=shared)
    position = moe.permute(indices, 16)[2]
    assert_same_bits(out, moe.combine(f32(y), position, weights, f32(shared)), "combination of 288 tokens")


def route(logits, k, *, bias, replay=None):
    """(weights, indices) of all rows; what a mutant breaks is how rows, biases and records are fed to the router."""
    rows = [
        moe.router_row(z, k, scoring="sigmoid", bias=bias, replay=None if replay is None else replay[t])
        for t, z in enumerate(logits)
    ]
    return np.stack([w for w, _ in rows]), np.stack([i for _, i in rows])


def gradients() -> None:
    """What GPU libraries add with atomics: gradients of weights, of an embedding, of queries and keys."""
    x, w, dy = hashed(70, 24, seed=17), hashed(9, 24, seed=18).requires_grad_(), hashed(70, 9, seed=19)
    w.main_grad = hashed(9, 24, seed=20).float()
    expected = linear.linear_backward(f32(x), f32(w), f32(dy), f32(w.main_grad))[1]
    kernels.linear(x, w).backward(dy)
    assert_same_bits(w.main_grad, expected, "dW")
    dy = hashed(70, 9, seed=19, kind="wide")
    ids, table = torch.arange(70) * 5 % 3, hashed(3, 9, seed=21).requires_grad_()
    table.main_grad = torch.zeros(3, 9)
    expected = linear.embedding_backward(ids.numpy(), f32(dy), f32(table.main_grad))
    kernels.embedding(ids, table).backward(dy)
    assert_same_bits(table.main_grad, expected, "embedding dW")
    q, k, v = (hashed(20, 1, 16, seed=s) for s in (22, 23, 24))
    # two keys whose shares of dQ cancel: what was added before them loses its low bits
    v[4] *= 2.0**20
    k[5], v[5] = k[4], -v[4]
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    dout, cu = hashed(20, 1, 16, seed=25), torch.tensor([0, 20], dtype=torch.int32)
    found = torch.autograd.grad(kernels.attention_varlen(q, k, v, cu, scale=0.25), (q, k, v), dout)
    arrays = [f32(t) for t in (q, k, v)]
    out, lse = attention.attention(*arrays, scale=0.25)
    wanted = attention.attention_backward(*arrays, out, lse, f32(dout), scale=0.25)
    for name, a, b in zip(("dQ", "dK", "dV"), found, wanted, strict=True):
        assert_same_bits(a, b, name)


def plain_chain(a, b, start=None, *, order=None, round_every=0, step=arith.fma_flushed):
    """R1 with its freedoms taken: the order of k, intermediate rounding, the fma."""
    acc = np.zeros((a.shape[0], b.shape[1]), F32) if start is None else start
    ks = order(a.shape[1]) if order else [i ^ 1 if i ^ 1 < a.shape[1] else i for i in range(a.shape[1])]
    for count, i in enumerate(ks):
        acc = step(a[:, i : i + 1], b[i : i + 1, :], acc)
        if round_every and count % round_every == round_every - 1:
            acc = arith.bf16(acc)
    return acc


def split_k(a, b, start=None):
    half = a.shape[1] // 4 * 2
    return (chain(a[:, :half], b[:half], start) + chain(a[:, half:], b[half:])).astype(F32)


def sequential_fold(lanes):
    total = lanes[..., 0]
    for i in range(1, lanes.shape[-1]):
        total = (total + lanes[..., i]).astype(F32)
    return total


def neighbour_fold(lanes):
    while lanes.shape[-1] > 1:
        lanes = (lanes[..., ::2] + lanes[..., 1::2]).astype(F32)
    return lanes[..., 0]


def contracted_merge(a, b):
    """s1 e1 + s2 e2 with the first product fused into the sum."""
    m = max(a[0], b[0])
    e1, e2 = (F32(logprob._exp(F32(s[0] - m))) for s in (a, b))
    return m, arith.fma(a[1], e1, F32(b[1] * e2)), a[2] + b[2]


def rounded_attention(*arguments):
    """Products rounded before they are added, wherever attention fuses them."""
    fused, attention.fma = attention.fma, lambda a, b, c: ((a * b).astype(F32) + c).astype(F32)
    try:
        return attend_row(*arguments)
    finally:
        attention.fma = fused


def segments_in_ascending_order(x, w, bias=None, *, segments=1, round_output=True):
    depth = x.shape[1] // segments
    parts = [chain(x[:, g * depth : (g + 1) * depth], w[:, g * depth : (g + 1) * depth].T) for g in range(segments)]
    total = parts[0]
    for part in parts[1:]:
        total = (total + part).astype(F32)
    return arith.bf16(total) if round_output else total


def later_index_first(values):
    return np.lexsort((-np.arange(len(values)), -values))


def slots_descending(y, position, weights, shared=None):
    return combine(y, position[:, ::-1], weights[:, ::-1], shared)


def shared_first(y, position, weights, shared=None):
    total = np.zeros((len(position), y.shape[1]), F32) if shared is None else shared
    for s in range(position.shape[1]):
        total = arith.fma(weights[:, s : s + 1], y[position[:, s]], total)
    return arith.bf16(total)


def arrival(terms):
    """Terms in the order in which four workers, a share each, get to add them: drawn, as atomics would have it."""
    shares = np.array_split(np.arange(terms), 4)
    return np.concatenate([shares[worker] for worker in np.random.default_rng(0).permutation(4)])


def atomic_dw(x, w, dy, dw):
    order = arrival(len(x))
    return linear_backward(x, w, dy, dw)[0], linear_backward(x[order], w, dy[order], dw)[1]


def atomic_embedding(ids, dy, dw):
    order = arrival(len(ids))
    return embedding_backward(ids[order], dy[order], dw)


def atomic_combine(y, position, weights, shared=None):
    """Experts add their rows when they are done."""
    order = arrival(position.shape[1])
    return combine(y, position[:, order], weights[:, order], shared)


def atomic_dq(q, k, v, out, lse, dout, *, scale):
    """Blocks of keys add their share of one head's dQ; dK and dV are right."""
    _, dk, dv = attention_backward(q, k, v, out, lse, dout, scale=scale)
    dq = np.zeros_like(q)
    for i in range(len(q)):
        seen, delta = (k[: i + 1, 0], v[: i + 1, 0]), attention._delta(out[i, 0], dout[i, 0])
        c = F32(scale) * arith.LOG2E
        _, ds = attention._score_gradients(q[i, 0], *seen, delta, lse[i, 0], dout[i, 0], c, scale)
        for j in arrival(len(k)):
            if j <= i:
                dq[i, 0] = arith.fma(ds[j], k[j, 0], dq[i, 0])
    return arith.bf16(dq), dk, dv


ATOMICS = {
    "dW": {"linear_backward": atomic_dw},
    "embedding": {"embedding_backward": atomic_embedding},
    "combine": {"combine": atomic_combine},
    "dQ": {"attention_backward": atomic_dq},
}


def slots_swapped(logits, k, **options):
    """The first two experts get each other's weights."""
    weights, indices = router_row(logits, k, **options)
    return weights[[1, 0, *range(2, k)]], indices


def stale_bias(logits, k, *, bias, **options):
    """The bias of an earlier step."""
    return router_row(logits, k, bias=np.roll(bias, 1), **options)


def records_shifted(logits, k, *, replay=None, **options):
    """Every token replays the experts of the token after it."""
    return live_route(logits, k, replay=None if replay is None else np.roll(replay, 1, axis=0), **options)


def biased_weights(logits, k, **options):
    p = (moe.scores(logits, "softmax") + options["bias"]).astype(F32)
    indices = moe.select(p, k, None)
    return (p[indices] / moe._chain_sum(p[indices])).astype(F32), indices


chain, combine, router_row, live_route = arith.chain, moe.combine, moe.router_row, route
linear_backward, embedding_backward = linear.linear_backward, linear.embedding_backward
attention_backward, attend_row = attention.attention_backward, attention.attend_row
MUTANTS = {
    "split-K": {"chain": split_k},
    "descending k": {"chain": lambda a, b, s=None: plain_chain(a, b, s, order=lambda n: range(n - 1, -1, -1))},
    "even k first": {"chain": lambda a, b, s=None: plain_chain(a, b, s, order=range)},
    "bf16 partial sums": {"chain": lambda a, b, s=None: plain_chain(a, b, s, round_every=64)},
    "subnormals kept": {"chain": lambda a, b, s=None: plain_chain(a, b, s, step=arith.fma)},
    "product rounded": {
        "chain": lambda a, b, s=None: plain_chain(a, b, s, step=lambda x, y, z: ((x * y).astype(F32) + z).astype(F32))
    },
    "segments in ascending order": {"linear": segments_in_ascending_order},
    "lanes folded one by one": {"fold": sequential_fold},
    "lanes folded by neighbours": {"fold": neighbour_fold},
    "library exp2": {"exp2": lambda x: np.exp2(np.asarray(x, np.float64)).astype(F32)},
    "contraction in the merge": {"_merge": contracted_merge},
    "four vocabulary segments": {"SEGMENTS": 4},
    "attention blocks of 32": {"BLOCK": 32},
    "attention segments of 64": {"SEGMENT": 64},
    "products of attention rounded": {"attend_row": rounded_attention},
    "ties to the later expert": {"_descending": later_index_first},
    "slots in descending order": {"combine": slots_descending},
    "shared expert first": {"combine": shared_first},
    "bias in the weights": {"router_row": biased_weights},
    "stale bias": {"router_row": stale_bias},
    "slots swapped": {"router_row": slots_swapped},
    "records of the next token": {"route": records_shifted},
    **{f"atomics order: {name}": mutant for name, mutant in ATOMICS.items()},
}


def test_the_unbroken_reference_passes():
    suite()


def plant(monkeypatch, mutant):
    """Put the wrong functions where the reference, or what feeds it here, looks them up."""
    for attribute, wrong in mutant.items():
        owners = [module for module in MODULES if hasattr(module, attribute)] or [sys.modules[__name__]]
        assert hasattr(owners[0], attribute), attribute
        for module in owners:
            monkeypatch.setattr(module, attribute, wrong)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(monkeypatch, name):
    plant(monkeypatch, MUTANTS[name])
    with pytest.raises(AssertionError):
        suite()


def test_of_atomics_the_order_is_caught(monkeypatch):
    """Workers that arrive one after the other pass: nothing else is wrong with those mutants."""
    monkeypatch.setattr(sys.modules[__name__], "arrival", np.arange)
    for mutant in ATOMICS.values():
        plant(monkeypatch, mutant)
    suite()
