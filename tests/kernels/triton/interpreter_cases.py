"""Every Triton kernel against the scalar-order reference, in Triton's interpreter. Run by ``test_interpreter.py``."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from data import assert_same_bits, cut_edges, f32, hashed
from interpreted import chain_matrix_steps, tl, triton
from memory import watch
from triton.runtime.errors import InterpreterError

from zerokl.kernels.reference import activation as ref_activation
from zerokl.kernels.reference import arith
from zerokl.kernels.reference import linear as ref_linear
from zerokl.kernels.reference import logprob as ref_logprob
from zerokl.kernels.reference import norm as ref_norm
from zerokl.kernels.reference import rotary as ref_rotary
from zerokl.kernels.reference import sampling as ref_sampling
from zerokl.kernels.triton import (
    _math,
    activation,
    linear,
    logprob,
    norm,
    rotary,
    sampling,
    selected_logprob,
)

chain_matrix_steps()
watch()
KINDS = ["plain", "wide", "cancel", "tiny"]
NAN = float("nan")


@triton.jit
def _apply(x_ptr, y_ptr, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, _math.exp2(x) if NAME == "exp2" else _math.log2(x), mask=at < n)


@pytest.mark.parametrize("name", ["exp2", "log2"])
def test_elementary(name):
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -149.5, -150.0, -150.5, 127.99, 128.0, 1e-45, 1e-38, 3e38, -3.0]
    x = np.concatenate([special, np.linspace(-160, 140, 5001), 2.0 ** np.linspace(-149, 127, 3001)]).astype(np.float32)
    y = torch.empty(len(x))
    _apply[(triton.cdiv(len(x), 1024),)](torch.from_numpy(x), y, len(x), NAME=name, BLOCK=1024)
    assert_same_bits(y, getattr(arith, name)(x), name)


def test_the_watch_sees_what_a_gpu_would_not_forgive():
    """A load past the end of a tensor; an element that one program writes and another reads, in either order."""
    line = torch.zeros(9)
    for x, y, n, words in (
        (line[:8], line.clone(), 9, "1 elements outside its tensors"),
        (line, line[:8].clone(), 9, "1 elements outside its tensors"),
        (line, line[1:], 8, "program 1 touches 1 elements written by another"),
        (line[1:], line, 8, "program 1 touches 1 elements read by another"),
    ):
        with pytest.raises(InterpreterError, match=words):
            _apply[(triton.cdiv(n, 4),)](x, y, n, NAME="exp2", BLOCK=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "n", "residual"), [(3, 300, True), (9, 64, False), (2, 1, False), (5, 129, True)])
def test_rms_norm(kind, rows, n, residual):
    x, r, w = hashed(rows, n, seed=1, kind=kind), hashed(rows, n, seed=2, kind=kind), hashed(n, seed=3)
    dy, ds, dw = hashed(rows, n, seed=4, kind=kind), hashed(rows, n, seed=5), hashed(n, seed=6).float()
    y, s = torch.empty_like(x), torch.empty_like(x)
    norm.rms_norm(x, r if residual else None, w, 1e-6, y, s if residual else None)
    expected, total = ref_norm.rms_norm(f32(x), f32(w), 1e-6, f32(r) if residual else None)
    assert_same_bits(y, expected, "y")
    if residual:
        assert_same_bits(s, total, "sum")
    s = s if residual else x
    dx, got = torch.empty_like(x), dw.clone()
    norm.rms_norm_backward(s, w, 1e-6, dy, ds if residual else None, dx, got)
    expected, expected_dw = ref_norm.rms_norm_backward(
        f32(s), f32(w), 1e-6, f32(dy), f32(ds) if residual else None, f32(dw)
    )
    assert_same_bits(dx, expected, "dx")
    assert_same_bits(got, expected_dw, "dw")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [7, 256, 1100])
def test_silu_and_mul(kind, n):
    x, dy = hashed(3, 2 * n, seed=1, kind=kind), hashed(3, n, seed=2, kind=kind)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    activation.silu_and_mul(x, None, y)
    activation.silu_and_mul_backward(x, None, dy, dx, None)
    assert_same_bits(y, ref_activation.silu_and_mul(f32(x)), "y")
    assert_same_bits(dx, ref_activation.silu_and_mul_backward(f32(x), f32(dy))[0], "dx")


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "turned"), [(3, 16, 16), (1, 12, 6), (17, 64, 48), (2, 5, 2)])
def test_rotary(heads, dim, turned, interleaved, inverse):
    # a slice of a wider tensor: strides are honoured
    x = hashed(4, heads + 2, dim, seed=1, kind="cancel")[:, 1 : 1 + heads]
    table = hashed(10, turned, seed=2).float() * 1.001
    positions = torch.tensor([9, 0, 3, 3])
    y = torch.empty(x.shape, dtype=x.dtype)
    rotary.rotary(x, positions, table, interleaved, inverse, y)
    options = {"interleaved": interleaved, "inverse": inverse}
    assert_same_bits(y, ref_rotary.rotary(f32(x), positions.numpy(), table.numpy(), **options), "y")
    with pytest.raises(RuntimeError, match="zerokl::rotary"):
        rotary.rotary(x, positions + 1, table, interleaved, inverse, y)


def test_neighbours_holding_nan_change_nothing():
    """R0: rows keep their bits when the row beside them turns into NaN or Inf."""
    x, w = hashed(6, 200, seed=1), hashed(200, seed=2)
    bad = x.clone()
    bad[1], bad[4] = NAN, float("inf")
    others = [0, 2, 3, 5]
    for run in (
        lambda x: _norm_of(x, w),
        lambda x: _norm_backward_of(x, w),
        lambda x: _call(lambda x, y: activation.silu_and_mul(x, None, y), x, (6, 100)),
    ):
        clean, dirty = run(x), run(bad)
        assert_same_bits(dirty[others], clean[others], "row beside NaN")
        assert dirty[1].isnan().all()


def _call(op, x, shape):
    y = torch.empty(shape, dtype=x.dtype)
    op(x, y)
    return y


def _norm_of(x, w):
    y = torch.empty_like(x)
    norm.rms_norm(x, None, w, 1e-6, y, None)
    return y


def _norm_backward_of(x, w):
    dx = torch.empty_like(x)
    norm.rms_norm_backward(x, w, 1e-6, hashed(*x.shape, seed=8), None, dx, None)
    return dx


def _logits(rows, vocab, kind="plain"):
    """fp32 logits with full mantissas, ties and both zeros."""
    z = hashed(rows, vocab, seed=3, kind=kind).float() * 9 * (1 + 2.0**-12)
    z[:, ::5] = z[:, :1]
    z[:, 3::7] = -0.0
    return z


FILTERS = [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.3, 1.0, 5), (0.9, 0.6, 12), (1.0, 1.0, 1)]


@pytest.mark.parametrize("vocab", [5, 1031])
def test_logprob_from_logits(vocab):
    rows = len(FILTERS)
    z = _logits(rows, vocab)
    targets = torch.tensor([i * 7 % vocab for i in range(rows)])
    temperature, top_p, top_k = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
    got, entropy = torch.empty(rows), torch.empty(rows)
    logprob.logprob_from_logits(z, targets, temperature, top_p, top_k.int(), got, entropy)
    expected = [ref_logprob.logprob_row(z[r].numpy(), int(targets[r]), *FILTERS[r]) for r in range(rows)]
    assert_same_bits(got, np.array([e[0] for e in expected]), "logprob")
    assert_same_bits(entropy, np.array([e[1] for e in expected]), "entropy")
    with pytest.raises(RuntimeError, match="logprob_from_logits"):
        logprob.logprob_from_logits(z, targets + vocab, temperature, top_p, top_k.int(), got, None)


def test_the_cut_to_the_last_bit():
    z, targets, top_p = cut_edges()
    got = torch.empty(3)
    logprob.logprob_from_logits(z, targets, torch.ones(3), top_p, torch.zeros(3, dtype=torch.int32), got, None)
    expected = [ref_logprob.logprob_row(z[r].numpy(), int(targets[r]), 1.0, float(top_p[r]))[0] for r in range(3)]
    assert_same_bits(got, np.array(expected), "logprob")


def test_logits_gradient():
    rows, vocab = len(FILTERS), 1031
    z = _logits(rows, vocab)
    targets = torch.tensor([i * 7 % vocab for i in range(rows)])
    temperature, top_p, top_k = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
    filter = logprob.find_filter(z, temperature, top_p, top_k.int())
    state = logprob.score(z, targets, filter, torch.empty(rows), None)
    grad = hashed(rows, seed=9).float()
    dz = torch.empty((rows, vocab), dtype=torch.bfloat16)
    selected_logprob.gradient_kernel[rows, 5](z, *filter, targets, state, grad, dz, 0, vocab, BLOCK=256)
    expected = [
        ref_logprob.logits_gradient(z[r].numpy(), int(targets[r]), float(grad[r]), *FILTERS[r]) for r in range(rows)
    ]
    assert_same_bits(dz, np.stack(expected), "dz")


def test_infinite_and_nan_logits():
    z = _logits(4, 300)
    z[0, :40] = -float("inf")
    z[1, 7], z[3, 299] = NAN, NAN
    # a whole segment (38 columns) without a finite maximum, NaN in it
    z[2, :38], z[2, 3] = -float("inf"), NAN
    clean = _logits(4, 300)
    got, entropy = torch.empty(4), torch.empty(4)
    plain = (torch.ones(4), torch.ones(4), torch.zeros(4, dtype=torch.int32))
    logprob.logprob_from_logits(z, torch.full((4,), 100), *plain, got, entropy)
    assert got[1:].isnan().all()
    assert_same_bits(got[0], np.float32(ref_logprob.logprob_row(z[0].numpy(), 100)[0]), "masked row")
    z[0] = clean[0]
    logprob.logprob_from_logits(z, torch.full((4,), 100), *plain, got, None)
    assert_same_bits(got[0], np.float32(ref_logprob.logprob_row(clean[0].numpy(), 100)[0]), "row beside NaN")


@pytest.mark.parametrize(
    ("vocab", "cases"), [(5, FILTERS[:2]), (300, [*FILTERS[:4], (0.0, 0.5, 3)]), (8300, [(0.8, 1.0, 0)])]
)
def test_sample(vocab, cases):
    rows = len(cases)
    z = _logits(rows, vocab)
    seeds = [2**40 + 17, 0, -1, 1, -(2**63)]
    places = [2**33 + 1, 0, 5, 12, 2**31]
    # all keys 0 where nothing is filtered: each of the noise's bits counts
    z[0] = -torch.from_numpy(ref_sampling.gumbel(vocab, seeds[0], places[0]))
    temperature, top_p, top_k = (torch.tensor(column) for column in zip(*cases, strict=True))
    token, got, raw = torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)
    sampling.sample(z, temperature, top_p, top_k.int(), torch.tensor(seeds), torch.tensor(places), token, got, raw)
    for r, case in enumerate(cases):
        row = z[r].numpy()
        expected = ref_sampling.sample_row(row, seeds[r], places[r], *case)
        assert token[r] == expected, f"row {r}"
        assert_same_bits(raw[r], np.float32(ref_logprob.logprob_row(row, expected)[0]), "raw")
        scored = ref_logprob.logprob_row(row, expected, *case)[0] if case[0] else raw[r].numpy()
        assert_same_bits(got[r], np.float32(scored), "logprob")


@pytest.mark.parametrize(
    ("m", "n", "k", "segments"), [(3, 70, 40, 1), (70, 33, 264, 4), (65, 130, 256, 8), (130, 70, 131, 1)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(m, n, k, segments, bias):
    x, w, b = hashed(m, k, seed=1), hashed(n, k, seed=2), hashed(n, seed=3).float() if bias else None
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.empty((m, n), dtype=dtype)
        linear.linear(x, w, b, segments, y)
        expected = ref_linear.linear(
            f32(x), f32(w), f32(b) if bias else None, segments=segments, round_output=dtype == torch.bfloat16
        )
        assert_same_bits(y, expected, "y")
    dy, dw = hashed(m, n, seed=4), hashed(n, k, seed=5).float()
    dx = torch.empty_like(x)
    expected_dx, expected_dw = ref_linear.linear_backward(f32(x), f32(w), f32(dy), f32(dw))
    linear.linear_dx(dy, w, dx)
    linear.linear_dw(dy, x, dw)
    assert_same_bits(dx, expected_dx, "dx")
    assert_same_bits(dw, expected_dw, "dw")


def test_linear_adds_segments_as_a_balanced_tree():
    """R2 with values whose sum depends on the order: exact in the interpreter, since every chain has one term."""
    depth, parts = 2, np.array([2.0**24, 1.0, 1.0, -(2.0**24), 1.0, 2.0**24, 5.0, -(2.0**24)], dtype=np.float32)
    x = torch.zeros(1, depth * 8, dtype=torch.bfloat16)
    x[0, ::depth] = torch.from_numpy(parts).bfloat16()
    y = torch.empty((1, 1))
    linear.linear(x, torch.ones(1, depth * 8, dtype=torch.bfloat16), None, 8, y)
    assert_same_bits(y, np.reshape(arith_tree(parts), (1, 1)), "tree")
    assert arith_tree(parts) != np.cumsum(parts, dtype=np.float32)[-1], "the data tells a tree from a chain"


def arith_tree(parts):
    """Neighbours added in fp32 until one is left."""
    while len(parts) > 1:
        parts = (parts[::2] + parts[1::2]).astype(np.float32)
    return parts[0]


def test_linear_beside_nan_rows():
    x, w = hashed(20, 48, seed=1), hashed(40, 48, seed=2)
    bad = x.clone()
    bad[3], bad[17] = NAN, float("inf")
    clean, dirty = torch.empty(20, 40), torch.empty(20, 40)
    linear.linear(x, w, None, 1, clean)
    linear.linear(bad, w, None, 1, dirty)
    others = [i for i in range(20) if i not in (3, 17)]
    assert_same_bits(dirty[others], clean[others], "row beside NaN")
    assert not dirty[[3, 17]].isfinite().any()


def test_embedding_and_bias_gradient():
    ids, w = torch.tensor([[3, 6, 3], [6, 3, 0]]), hashed(7, 130, seed=1, kind="tiny")
    y = torch.empty((2, 3, 130), dtype=torch.bfloat16)
    linear.embedding(ids, w, y)
    assert_same_bits(y, f32(w[ids]), "y")
    dy, dw = hashed(2, 3, 130, seed=2, kind="wide"), hashed(7, 130, seed=3).float()
    db = dw[0].clone()
    expected = ref_linear.embedding_backward(ids.reshape(-1).numpy(), f32(dy).reshape(6, 130), f32(dw))
    linear.embedding_dw(ids, dy, dw)
    assert_same_bits(dw, expected, "dw")
    expected = f32(db).copy()
    for row in f32(dy).reshape(6, 130):
        expected = expected + row
    linear.bias_grad(dy, db)
    assert_same_bits(db, expected, "db")
    with pytest.raises(RuntimeError, match="zerokl::embedding"):
        linear.embedding(ids - 1, w, y)


@pytest.mark.parametrize("cases", [FILTERS, [(1.0, 1.0, 0), (0.6, 1.0, 0)]])
def test_selected_logprob(cases, monkeypatch):
    """The fused head equals linear, then log-probabilities from logits, in forward and backward, and the reference."""
    monkeypatch.setattr(selected_logprob, "rows_at_once", lambda _: 2)
    rows, vocab, width = len(cases), 150, 32
    hidden, w = hashed(rows, width, seed=1) * 3, hashed(vocab, width, seed=2)
    targets = torch.tensor([i * 31 % vocab for i in range(rows)])
    temperature, top_p, top_k = (torch.tensor(column) for column in zip(*cases, strict=True))
    got, entropy, state, cut = torch.empty(rows), torch.empty(rows), torch.empty(rows, 2), torch.empty(rows)
    cut_index = torch.empty(rows, dtype=torch.int64)
    sampling_args = (temperature, top_p, top_k.int())
    selected_logprob.selected_logprob(hidden, w, targets, *sampling_args, got, entropy, state, cut, cut_index)
    logits = ref_linear.linear(f32(hidden), f32(w), round_output=False)
    expected = [ref_logprob.logprob_row(logits[r], int(targets[r]), *cases[r]) for r in range(rows)]
    assert_same_bits(got, np.array([e[0] for e in expected]), "logprob")
    assert_same_bits(entropy, np.array([e[1] for e in expected]), "entropy")
    grad, dhidden, dw = hashed(rows, seed=3).float(), torch.zeros(rows, width), hashed(vocab, width, seed=4).float()
    dz = np.stack(
        [ref_logprob.logits_gradient(logits[r], int(targets[r]), float(grad[r]), *cases[r]) for r in range(rows)]
    )
    expected_dh = ref_logprob.hidden_gradient(dz, f32(w))
    expected_dw = arith.chain(dz.T, f32(hidden), dw.numpy())
    saved = (hidden, w, targets, temperature, state, cut, cut_index)
    selected_logprob.selected_logprob_backward(*saved, vocab, 0, 1, grad, dhidden, dw)
    assert_same_bits(dhidden, expected_dh, "dhidden")
    assert_same_bits(dw, expected_dw, "dw")


@pytest.mark.parametrize(("vocab", "ranks"), [(150, 2), (40, 4), (9, 8)])
def test_selected_logprob_of_ranks_that_share_a_vocabulary(vocab, ranks, monkeypatch):
    """Shares put together equal the reference's whole, forward and backward; 9 leaves the last segments empty."""
    monkeypatch.setattr(selected_logprob, "rows_at_once", lambda _: 4)
    rows, depth = 6, 20
    hidden, w = hashed(rows, depth, seed=1) * 3, hashed(vocab, depth, seed=2)
    targets, temperature = torch.arange(rows) * 31 % vocab, torch.linspace(0.7, 1.3, rows)
    options = [(float(t), 1.0, 0) for t in temperature]
    logits = ref_linear.linear(f32(hidden), f32(w), round_output=False)
    expected = [ref_logprob.logprob_row(logits[r], int(targets[r]), *options[r]) for r in range(rows)]
    width = -(-vocab // 8) * (8 // ranks)
    shares = [w[rank * width : (rank + 1) * width] for rank in range(ranks)]
    sums, hits = [torch.empty(rows, 8 // ranks, 3) for _ in shares], torch.empty(ranks, rows)
    for rank, share in enumerate(shares):
        selected_logprob.logprob_segments(
            hidden, share, targets, temperature, vocab, rank, ranks, True, sums[rank], hits[rank]
        )
    got, entropy, state = torch.empty(rows), torch.empty(rows), torch.empty(rows, 2)
    selected_logprob.logprob_merge(torch.cat(sums, 1), hits.gather(0, (targets // width)[None])[0], got, entropy, state)
    assert_same_bits(got, np.array([e[0] for e in expected]), "logprob")
    assert_same_bits(entropy, np.array([e[1] for e in expected]), "entropy")

    grad, dw = hashed(rows, seed=3).float(), hashed(vocab, depth, seed=4).float()
    dz = np.stack(
        [ref_logprob.logits_gradient(logits[r], int(targets[r]), float(grad[r]), *options[r]) for r in range(rows)]
    )
    expected_dw = arith.chain(dz.T, f32(hidden), dw.numpy())
    cut, index = torch.full_like(temperature, -float("inf")), torch.zeros_like(targets)
    saved, parts = (targets, temperature, state, cut, index), []
    for rank, share in enumerate(shares):
        part, dshare = torch.empty(rows, depth), dw[rank * width : (rank + 1) * width]
        selected_logprob.selected_logprob_backward(hidden, share, *saved, vocab, rank, ranks, grad, part, dshare)
        parts.append(part.numpy())
    assert_same_bits(arith_tree(np.stack(parts)), ref_logprob.hidden_gradient(dz, f32(w)), "dhidden")
    assert_same_bits(dw, expected_dw, "dw")


def test_shares_of_a_vocabulary_are_checked():
    hidden, w, t = hashed(2, 4, seed=1), hashed(5, 4, seed=2), torch.ones(2)
    out = (torch.empty(2, 4, 3), torch.empty(2))
    for vocab, rank, ranks, words in ((9, 0, 2, "w has 5 rows; rank 0 of 2 holds 8"), (5, 0, 3, "rank 0 of 3")):
        with pytest.raises(ValueError, match=words):
            selected_logprob.logprob_segments(
                hidden, w, torch.zeros(2, dtype=torch.int64), t, vocab, rank, ranks, False, *out
            )
