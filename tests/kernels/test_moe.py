"""Router, permutation, expert layers, combination: equal to the reference in every byte, on every instruction set."""

import numpy as np
import pytest
import torch
from data import assert_same_bits, f32, hashed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zerokl import kernels
from zerokl.kernels.reference import arith
from zerokl.kernels.reference import moe as ref

drawn = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GROUPS = {1: None, 4: kernels.Groups(4, 2), 8: kernels.Groups(8, 3, judges=1)}


def logits_of(rows: int, experts: int, seed: int = 1) -> torch.Tensor:
    """fp32 logits with ties between neighbouring experts, and both zeros."""
    x = hashed(rows, experts, seed=seed).float() * 6
    x[:, 1::3] = x[:, 0::3][:, : x[:, 1::3].shape[1]]
    x[::2, 5::7] = 0.0
    x[::2, 6::7] = -0.0
    return x


def as_tuple(groups: kernels.Groups | None):
    return None if groups is None else (groups.count, groups.keep, groups.judges)


@drawn
@given(
    rows=st.sampled_from([1, 3, 17, 33]),
    experts=st.sampled_from([8, 16, 40, 64, 136]),
    k=st.sampled_from([1, 2, 3]),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    group=st.sampled_from(list(GROUPS)),
    bias=st.booleans(),
    renormalize=st.booleans(),
)
def test_router_topk(isa, rows, experts, k, scoring, group, bias, renormalize):
    logits = logits_of(rows, experts).requires_grad_()
    b = hashed(experts, seed=9).float() if bias else None
    options = {"scoring": scoring, "renormalize": renormalize, "scale": 2.5}
    got = kernels.router_topk(logits, k, groups=GROUPS[group], bias=b, **options)
    expected = [
        ref.router_row(z, k, groups=as_tuple(GROUPS[group]), bias=None if b is None else f32(b), **options)
        for z in f32(logits)
    ]
    assert got.indices.tolist() == [e[1].tolist() for e in expected]
    assert_same_bits(got.weights, np.stack([e[0] for e in expected]), "weights")
    dw = hashed(rows, k, seed=3).float()
    (dlogits,) = torch.autograd.grad(got.weights, logits, dw)
    want = [
        ref.router_row_gradient(z, i, g, **options)
        for z, i, g in zip(f32(logits), got.indices.numpy(), f32(dw), strict=True)
    ]
    assert_same_bits(dlogits, np.stack(want), "dlogits")


def test_router_gradient_against_float64(isa):
    """What autograd says about the same function in float64."""
    for scoring in ("softmax", "sigmoid"):
        for renormalize in (True, False):
            logits = hashed(7, 24, seed=2).float().mul(3).requires_grad_()
            got = kernels.router_topk(logits, 4, scoring=scoring, renormalize=renormalize, scale=1.7)
            wide = logits.detach().double().requires_grad_()
            p = torch.softmax(wide, -1) if scoring == "softmax" else torch.sigmoid(wide)
            w = p.gather(1, got.indices)
            w = 1.7 * (w / w.sum(-1, keepdim=True) if renormalize else w)
            dw = hashed(7, 4, seed=5).float()
            assert (got.weights.double() - w).abs().max() < 1e-6
            (a,) = torch.autograd.grad(got.weights, logits, dw)
            (b,) = torch.autograd.grad(w, wide, dw.double())
            assert (a.double() - b).abs().max() < 1e-6


def test_ties_go_to_the_lower_index_and_nan_to_nobody(isa):
    logits = torch.zeros(2, 6)
    logits[1, 2] = float("nan")
    assert kernels.router_topk(logits, 3, scoring="sigmoid").indices.tolist() == [[0, 1, 2], [0, 1, 3]]
    # softmax: a NaN reaches the sum, so every weight of that row shows it, and of no other row
    weights = kernels.router_topk(logits, 3, scoring="softmax").weights
    assert torch.isnan(weights[1]).all()
    assert not torch.isnan(weights[0]).any()


def test_groups_are_judged_in_descending_order(isa):
    """Sums of the judges 2^24, 1, 1 and 2^24, 1/2, 1/2: a tie from the largest on, not from the smallest."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 100.0, 100.0]])
    bias = torch.tensor([2.0**24, 0.0, 0.0, 2.0**24, 0.0, 0.0])
    groups = kernels.Groups(2, 1, judges=3)
    got = kernels.router_topk(logits, 3, scoring="sigmoid", bias=bias, groups=groups)
    assert got.indices.tolist() == [[0, 1, 2]]


def test_replay_takes_the_indices_and_live_weights(isa):
    logits = logits_of(9, 16).requires_grad_()
    chosen = kernels.router_topk(logits, 3, scoring="softmax")
    again = kernels.router_topk(logits, 3, scoring="softmax", replay=chosen.indices.to(torch.uint8))
    assert torch.equal(again.indices, chosen.indices)
    assert_same_bits(again.weights, chosen.weights, "replayed weights")
    other = kernels.router_topk(logits, 3, scoring="softmax", replay=torch.tensor([[15, 0, 7]]).expand(9, 3))
    expected = [ref.router_row(z, 3, scoring="softmax", replay=np.array([15, 0, 7]))[0] for z in f32(logits)]
    assert_same_bits(other.weights, np.stack(expected), "weights of other experts")
    assert torch.autograd.grad(other.weights.sum(0)[0], logits)[0].abs().sum() > 0
    bad = chosen.indices.clone()
    bad[2, 1] = 16
    with pytest.raises(RuntimeError, match="replay row 2 names expert 16"):
        kernels.router_topk(logits, 3, scoring="softmax", replay=bad)
    with pytest.raises(RuntimeError, match="twice"):
        kernels.router_topk(logits, 3, scoring="softmax", replay=torch.zeros(9, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 17}, "k=17"),
        ({"scoring": "tanh"}, "scoring"),
        ({"groups": kernels.Groups(3, 1)}, "Groups"),
        ({"groups": kernels.Groups(8, 1)}, "Groups"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"replay": torch.zeros(4, 2, dtype=torch.int64)}, "replay"),
    ],
)
def test_router_refuses(options, message):
    arguments = {"k": 3, "scoring": "softmax"} | options
    with pytest.raises(ValueError, match=message):
        kernels.router_topk(torch.zeros(4, 16), **arguments)


def routed(tokens: int, experts: int, k: int, seed: int = 1):
    """Distinct experts per token; expert 0 gets none."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([1 + rng.permutation(experts - 1)[:k] for _ in range(tokens)]))


@drawn
@given(tokens=st.sampled_from([1, 3, 17, 65]), k=st.sampled_from([1, 2, 5]), n=st.integers(1, 70))
def test_permute_and_combine(isa, tokens, k, n):
    experts = 7
    x, indices = hashed(tokens, n, seed=1).requires_grad_(), routed(tokens, experts, k)
    rows, permutation = kernels.moe_permute(x, indices, experts)
    offsets, source, position = ref.permute(indices.numpy(), experts)
    assert permutation.offsets.tolist() == offsets.tolist()
    assert permutation.source.tolist() == source.tolist()
    assert permutation.position.tolist() == position.tolist()
    assert_same_bits(rows, f32(x)[source // k], "rows")
    drows = hashed(tokens * k, n, seed=2, kind="cancel")
    (dx,) = torch.autograd.grad(rows, x, drows)
    assert_same_bits(dx, ref.permute_backward(f32(drows), position), "dx")

    # the first two slots leave what rounding lost, so that bf16 shows every rounding and the order of what follows
    y, weights = hashed(tokens * k, n, seed=3, kind="cancel"), hashed(tokens, k, seed=4).float() * (1 + 2.0**-12)
    if k > 1:
        y[position[:, 0]] *= 2.0**12
        y[position[:, 1]], weights[:, 1] = -y[position[:, 0]], weights[:, 0]
    y, weights = y.requires_grad_(), weights.requires_grad_()
    shared = hashed(tokens, n, seed=5).requires_grad_()
    for s in (None, shared):
        out = kernels.moe_combine(y, permutation, weights, shared=s)
        assert_same_bits(out, ref.combine(f32(y), position, f32(weights), None if s is None else f32(s)), "combined")
        dout = hashed(tokens, n, seed=6)
        dy, dw, *ds = torch.autograd.grad(out, (y, weights) if s is None else (y, weights, s), dout)
        want = ref.combine_backward(f32(y), position, f32(weights), f32(dout))
        assert_same_bits(dy, want[0], "dy")
        assert_same_bits(dw, want[1], "dweights")
        if ds:
            assert_same_bits(ds[0], dout, "dshared")


@pytest.mark.parametrize(
    "counts", [[0, 5, 1, 0, 14], [20, 0, 0, 0, 0], [0, 0, 0, 0, 20], [4, 4, 4, 4, 4], [0, 0, 0, 0, 0]]
)
@pytest.mark.parametrize("segments", [1, 4])
def test_grouped_linear(isa, counts, segments):
    rows, k, n = sum(counts), 48, 37
    offsets = torch.tensor(np.cumsum([0, *counts]))
    x = hashed(rows, k, seed=1, kind="cancel").requires_grad_()
    w = hashed(len(counts), n, k, seed=2).requires_grad_()
    y = kernels.grouped_linear(x, w, offsets, segments=segments)
    assert_same_bits(y, ref.grouped_linear(f32(x), f32(w), offsets.numpy(), segments=segments), "y")
    dy = hashed(rows, n, seed=3)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    want = ref.grouped_linear_backward(f32(x), f32(w), offsets.numpy(), f32(dy), np.zeros(w.shape, np.float32))
    assert_same_bits(dx, want[0], "dx")
    assert_same_bits(dw, arith.bf16(want[1]), "dw")


@pytest.mark.parametrize("segments", [1, 4])
def test_grouped_linear_without_rounding(isa, segments):
    """What ranks that share the experts' columns add up; the gradient is rounded first."""
    counts, k, n = [0, 5, 1, 14], 48, 37
    offsets = torch.tensor(np.cumsum([0, *counts]))
    x = hashed(sum(counts), k, seed=1, kind="cancel").requires_grad_()
    w = hashed(len(counts), n, k, seed=2).requires_grad_()
    y = kernels.grouped_linear(x, w, offsets, segments=segments, out_dtype=torch.float32)
    want = ref.grouped_linear(f32(x), f32(w), offsets.numpy(), segments=segments, round_output=False)
    assert y.dtype == torch.float32
    assert_same_bits(y, want, "y")
    dy = hashed(sum(counts), n, seed=3).float() * 1.001
    rounded = kernels.grouped_linear(x, w, offsets, segments=segments)
    got, expected = (torch.autograd.grad(out, (x, w), g) for out, g in ((y, dy), (rounded, dy.bfloat16())))
    for name, a, b in zip(("dx", "dw"), got, expected, strict=True):
        assert_same_bits(a, b, name)


def test_grouped_linear_refuses_other_outputs():
    offsets = torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=r"grouped_linear: out_dtype torch\.float16; supported"):
        kernels.grouped_linear(hashed(6, 8, seed=1), hashed(2, 4, 8, seed=2), offsets, out_dtype=torch.float16)


@pytest.mark.parametrize("offsets", [[0, 3, 2, 6], [1, 2, 3, 6], [0, 2, 4, 7]])
def test_grouped_linear_refuses_wrong_offsets(offsets):
    with pytest.raises(RuntimeError, match="offsets"):
        kernels.grouped_linear(hashed(6, 8, seed=1), hashed(3, 4, 8, seed=2), torch.tensor(offsets))


def layer(x, gate, up, down, *, k=3, experts=12, shared=None):
    """A whole expert layer from the public ops."""
    logits = kernels.linear(x, gate, out_dtype=torch.float32)
    routing = kernels.router_topk(logits, k, scoring="softmax")
    rows, permutation = kernels.moe_permute(x, routing.indices, experts)
    hidden = kernels.silu_and_mul(kernels.grouped_linear(rows, up, permutation.offsets))
    out = kernels.grouped_linear(hidden, down, permutation.offsets)
    return kernels.moe_combine(out, permutation, routing.weights, shared=shared)


def test_a_token_does_not_see_its_neighbours(isa):
    """R0 for the whole layer: alone, in a batch, permuted, beside a NaN row: the same bits."""
    x = hashed(33, 40, seed=1)
    gate, up, down = hashed(12, 40, seed=2), hashed(12, 64, 40, seed=3), hashed(12, 40, 32, seed=4)
    whole = layer(x, gate, up, down)
    order = torch.from_numpy(np.random.default_rng(0).permutation(33))
    assert_same_bits(layer(x[order], gate, up, down), whole[order], "permuted")
    for r in (0, 7, 32):
        assert_same_bits(layer(x[r : r + 1], gate, up, down), whole[r : r + 1], f"row {r} alone")
    poisoned = x.clone()
    poisoned[5] = float("nan")
    keep = torch.arange(33) != 5
    assert_same_bits(layer(poisoned, gate, up, down)[keep], whole[keep], "beside NaN")


def test_experts_on_other_ranks_change_no_bit(isa):
    """Expert parallel 1, 2, 4, 8 in one process: each rank computes its experts' rows, the home rank combines."""
    x = hashed(21, 40, seed=1)
    gate, up, down = hashed(16, 40, seed=2), hashed(16, 64, 40, seed=3), hashed(16, 40, 32, seed=4)
    whole = layer(x, gate, up, down, experts=16)
    routing = kernels.router_topk(kernels.linear(x, gate, out_dtype=torch.float32), 3, scoring="softmax")
    rows, permutation = kernels.moe_permute(x, routing.indices, 16)
    for ranks in (2, 4, 8):
        parts, size = [], 16 // ranks
        for rank in range(ranks):
            mine = permutation.offsets[rank * size : (rank + 1) * size + 1]
            local = rows[mine[0] : mine[-1]]
            hidden = kernels.silu_and_mul(
                kernels.grouped_linear(local, up[rank * size : (rank + 1) * size].contiguous(), mine - mine[0])
            )
            parts.append(
                kernels.grouped_linear(hidden, down[rank * size : (rank + 1) * size].contiguous(), mine - mine[0])
            )
        assert_same_bits(kernels.moe_combine(torch.cat(parts), permutation, routing.weights), whole, f"{ranks} ranks")


def test_threads_change_no_bit(isa):
    x = hashed(70, 40, seed=1)
    gate, up, down = hashed(12, 40, seed=2), hashed(12, 64, 40, seed=3), hashed(12, 40, 32, seed=4)
    whole = layer(x, gate, up, down)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_same_bits(layer(x, gate, up, down), whole, f"{threads} threads")
