"""Every compiled op equals the scalar-order reference in every byte, on every instruction set, forward and backward."""

import functools
import itertools

import numpy as np
import pytest
import torch
from data import assert_same_bits, cut_edges, f32, hashed, tie
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zerokl import kernels
from zerokl.kernels.ops._common import ops
from zerokl.kernels.reference import activation as ref_activation
from zerokl.kernels.reference import arith
from zerokl.kernels.reference import attention as ref_attention
from zerokl.kernels.reference import linear as ref_linear
from zerokl.kernels.reference import logprob as ref_logprob
from zerokl.kernels.reference import norm as ref_norm
from zerokl.kernels.reference import rotary as ref_rotary
from zerokl.kernels.reference import sampling as ref_sampling

KINDS = ["plain", "wide", "cancel", "tiny"]
KIND = st.sampled_from(KINDS)
# the fixture only selects code paths; reusing it across examples is what we want
drawn = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def gradients(out, *leaves, seed=99):
    """Backpropagate a hashed gradient through out; returns (that gradient, gradients of the leaves)."""
    grad = hashed(*out.shape, seed=seed).to(out.dtype)
    return grad, torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("name", ["exp2", "log2"])
def test_elementary(isa, name):
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1.0,
        -1.0,
        0.5,
        -149.5,
        -150.0,
        127.99,
        128.0,
        1e-45,
        1e-38,
        3.4e38,
        -3.0,
    ]
    x = np.concatenate([np.array(special), np.linspace(-160, 140, 5001), 2.0 ** np.linspace(-149, 127, 3001)]).astype(
        np.float32
    )
    y = torch.empty(len(x))
    getattr(ops, name)(torch.from_numpy(x), y)
    expected = getattr(arith, name)(x)
    assert_same_bits(y, expected, name)
    with np.errstate(all="ignore"):
        true = getattr(np, name)(x.astype(np.float64))
    ok = np.isfinite(true) & (np.abs(true) > 1e-30) & (np.abs(true) < 3e38)
    assert np.max(np.abs(expected[ok] - true[ok]) / np.maximum(np.abs(true[ok]), 1e-3)) < 4e-7
    assert expected[0] == (1.0 if name == "exp2" else -np.inf)


def test_fma_reference_rounds_once():
    """The reference's own fma against exact rational arithmetic."""
    from fractions import Fraction

    a, b, c = (f32(hashed(400, seed=s, kind="wide")) * np.float32(1 + 2.0**-12) for s in (1, 2, 3))
    c = np.where(np.arange(400) % 3 == 0, -(a * b), c).astype(np.float32)
    got = arith.fma(a, b, c)
    for i in range(400):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = [got[i], np.nextafter(got[i], np.float32(np.inf)), np.nextafter(got[i], np.float32(-np.inf))]
        assert min(near, key=lambda v: abs(Fraction(float(v)) - exact)) == got[i]


@drawn
@given(
    m=st.sampled_from([1, 2, 3, 4, 11, 12, 13, 17, 49, 65]),
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    kind=KIND,
    bias=st.booleans(),
    fp32=st.booleans(),
)
def test_linear(isa, m, n, k, kind, bias, fp32):
    x, w = hashed(m, k, seed=1, kind=kind).requires_grad_(), torch.nn.Parameter(hashed(n, k, seed=2, kind=kind))
    b = hashed(n, seed=3) if bias else None
    y = kernels.linear(x, w, b, out_dtype=torch.float32 if fp32 else None)
    assert_same_bits(y, ref_linear.linear(f32(x), f32(w), None if b is None else f32(b), round_output=not fp32), "y")
    w.main_grad = torch.zeros(n, k)  # fp32 shows the order in which tokens are added
    dy = hashed(m, n, seed=99).to(y.dtype)
    y.backward(dy)
    dx, dw = ref_linear.linear_backward(f32(x), f32(w), arith.bf16(f32(dy)), np.zeros((n, k), np.float32))
    assert_same_bits(x.grad, dx, "dx")
    assert_same_bits(w.main_grad, dw, "dw")


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_linear_few_rows(isa, m):
    """Up to four rows have a kernel of their own: panels and blocks of k that are whole, and their ends."""
    for n, k in ((70, 101), (64, 64), (3, 2)):
        x, w, b = hashed(m, k, seed=4, kind="cancel"), hashed(n, k, seed=5, kind="wide"), hashed(n, seed=6)
        y = kernels.linear(x, w, b, out_dtype=torch.float32)
        assert_same_bits(y, ref_linear.linear(f32(x), f32(w), f32(b), round_output=False), f"y, {n} x {k}")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 333])
def test_read_reads_every_word_once(isa, threads, rows):
    w, word = hashed(rows, 3 * 34, seed=4), torch.empty(1, dtype=torch.int32)
    torch.set_num_threads(threads)
    ops.read(w, word)
    assert int(word) == np.bitwise_xor.reduce(w.view(torch.int32).numpy(), axis=None)


@pytest.mark.parametrize("m", [129, 257, 2049])
def test_linear_many_rows(isa, m):
    x, w = hashed(m, 40, seed=4, kind="cancel"), hashed(37, 40, seed=5)
    assert_same_bits(kernels.linear(x, w), ref_linear.linear(f32(x), f32(w)), "y")


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
@pytest.mark.parametrize("m", [1, 4, 7, 40])
def test_linear_segments(isa, m, segments):
    x, w = hashed(m, 8 * 38, seed=6, kind="cancel"), hashed(45, 8 * 38, seed=7)
    y = kernels.linear(x, w, segments=segments, out_dtype=torch.float32)
    assert_same_bits(y, ref_linear.linear(f32(x), f32(w), segments=segments, round_output=False), "y")


@pytest.mark.parametrize(("n", "k"), [(20, 33), (3, 1)])
def test_linear_main_grad_continues_the_chain(isa, n, k):
    """Two micro-batches into main_grad equal one batch: a chain cut between pairs of tokens keeps its bits."""
    x, w = hashed(50, k, seed=8), torch.nn.Parameter(hashed(n, k, seed=9))
    w.main_grad = torch.zeros(n, k)
    dy = hashed(50, n, seed=10)
    for part in (slice(0, 14), slice(14, 50)):
        kernels.linear(x[part], w).backward(dy[part])
    _, expected = ref_linear.linear_backward(f32(x), f32(w), f32(dy), np.zeros((n, k), np.float32))
    assert_same_bits(w.main_grad, expected, "main_grad")
    assert w.grad_added_to_main_grad


def test_linear_bias_gradient(isa):
    x, w, b = hashed(19, 8, seed=1), hashed(21, 8, seed=2), torch.nn.Parameter(hashed(21, seed=3))
    b.main_grad = torch.zeros(21)
    dy = hashed(19, 21, seed=4, kind="wide")
    kernels.linear(x, w, b).backward(dy)
    expected = np.zeros(21, np.float32)
    for row in f32(dy):
        expected = expected + row
    assert_same_bits(b.main_grad, expected, "db")


def test_embedding(isa):
    ids, w = torch.tensor([3, 1, 3, 0, 3]), torch.nn.Parameter(hashed(5, 70, seed=11))
    w.main_grad = hashed(5, 70, seed=12).float()
    expected = ref_linear.embedding_backward(ids.numpy(), f32(hashed(5, 70, seed=99, kind="wide")), f32(w.main_grad))
    y = kernels.embedding(ids, w)
    assert_same_bits(y, ref_linear.embedding(ids.numpy(), f32(w)), "y")
    y.backward(hashed(5, 70, seed=99, kind="wide"))
    assert_same_bits(w.main_grad, expected, "dw")
    with pytest.raises(RuntimeError, match="outside"):
        kernels.embedding(torch.tensor([5]), w)


@drawn
@given(rows=st.sampled_from([1, 3, 17, 33]), n=st.integers(1, 300), kind=KIND, residual=st.booleans())
def test_rms_norm(isa, rows, n, kind, residual):
    x, w = hashed(rows, n, seed=1, kind=kind).requires_grad_(), torch.nn.Parameter(hashed(n, seed=2))
    w.main_grad = torch.zeros(n)  # fp32 shows the order in which tokens are added
    r = hashed(rows, n, seed=3, kind=kind) if residual else None
    eps = 1e-5
    out = kernels.rms_norm(x, w, eps, residual=r) if residual else (kernels.rms_norm(x, w, eps), None)
    y, s = ref_norm.rms_norm(f32(x), f32(w), eps, None if r is None else f32(r))
    assert_same_bits(out[0], y, "y")
    dy, ds = hashed(rows, n, seed=4), hashed(rows, n, seed=5)
    if residual:
        assert_same_bits(out[1], s, "sum")
        dx, _ = torch.autograd.grad(out, (x, w), (dy, ds))
    else:
        dx, _ = torch.autograd.grad(out[0], (x, w), dy)
    expected = ref_norm.rms_norm_backward(
        s, f32(w), eps, f32(dy), f32(ds) if residual else None, np.zeros(n, np.float32)
    )
    assert_same_bits(dx, expected[0], "dx")
    assert_same_bits(w.main_grad, expected[1], "dw")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 80), (96, 20), (128, 64), (256, 64), (7, 6), (6, 2)])
def test_rotary(isa, dim, rotary_dim, interleaved):
    table = kernels.rotary_table(50, rotary_dim, 1e4)
    positions = torch.arange(20) * 7 % 50
    wide = hashed(20, 5, dim + 3, seed=1, kind="cancel").requires_grad_()  # a strided view, as from a fused projection
    q, k = wide[:, :3, :dim], wide[:, 3:, :dim]
    qr, kr = kernels.rotary(q, k, positions, table, interleaved=interleaved)
    options = {"positions": positions.numpy(), "table": table.numpy(), "interleaved": interleaved}
    for got, x in ((qr, q), (kr, k)):
        assert_same_bits(got, ref_rotary.rotary(f32(x), **options), "rotary")
        assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:]), "the rest passes through"
    dq, dk = hashed(20, 3, dim, seed=2), hashed(20, 2, dim, seed=3)
    (dwide,) = torch.autograd.grad((qr, kr), wide, (dq, dk))
    for got, grad in ((dwide[:, :3, :dim], dq), (dwide[:, 3:, :dim], dk)):
        assert_same_bits(got, ref_rotary.rotary(f32(grad), **options, inverse=True), "gradient")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_by_their_angle(interleaved):
    """Against complex multiplication in float64, the pairs taken as the style names them."""
    table, positions = kernels.rotary_table(32, 24, 1e4), torch.arange(32)
    q = hashed(32, 2, 40, seed=1)
    got, _ = kernels.rotary(q, q, positions, table, interleaved=interleaved)

    def pairs(x):
        x = x[..., :24].double()
        x = x.unflatten(-1, (12, 2)) if interleaved else x.unflatten(-1, (2, 12)).transpose(-1, -2)
        return torch.view_as_complex(x.contiguous())

    angle = positions[:, None].double() * 1e4 ** (-torch.arange(12).double() / 12)
    expected = pairs(q) * torch.polar(torch.ones_like(angle), angle)[:, None]
    assert (torch.view_as_real(pairs(got) - expected)).abs().max() < 2.0**-8
    assert torch.equal(got[..., 24:], q[..., 24:])


def test_rotary_errors_name_the_argument():
    q, positions, table = hashed(3, 2, 8, seed=1), torch.arange(3), kernels.rotary_table(4, 8, 1e4)
    for arguments, message in (
        ((q, q[..., :6], positions, table), r"q .* and k .* must be \[T, heads, D\]"),
        ((q, q, positions[:2], table), r"positions \(2,\); expected \(3,\)"),
        ((q[..., :6], q[..., :6], positions, table), r"table torch.float32 \(4, 8\) must be fp32 .* in 1\.\.6"),
        ((q, q, positions, table.double()), "table torch.float64"),
        ((q, q, positions, table[:, :7]), "table turns 7 dimensions; supported: an even number"),
        ((q, q, positions, table[:, :0]), r"table .* \(4, 0\)"),
        ((q.float(), q, positions, table), "q is torch.float32"),
    ):
        with pytest.raises(ValueError, match=rf"zerokl\.kernels\.rotary: {message}"):
            kernels.rotary(*arguments, interleaved=True)
    with pytest.raises(RuntimeError, match="outside"):
        kernels.rotary(q, q, positions + 2, table)


@drawn
@given(rows=st.sampled_from([1, 5, 33]), n=st.integers(1, 300), kind=KIND, weighted=st.booleans())
def test_silu_and_mul(isa, rows, n, kind, weighted):
    x = hashed(rows, 2 * n, seed=1, kind=kind)
    x[:, :n:3] = -1.28125  # there dg nearly vanishes, so that bf16 shows its roundings
    x = x.requires_grad_()
    weight = hashed(rows, seed=2).float().requires_grad_() if weighted else None
    y = kernels.silu_and_mul(x, row_weight=weight)
    w = None if weight is None else f32(weight)
    assert_same_bits(y, ref_activation.silu_and_mul(f32(x), w), "y")
    dy, (dx, *dw) = gradients(y, *((x,) if weight is None else (x, weight)))
    expected = ref_activation.silu_and_mul_backward(f32(x), f32(dy), w)
    assert_same_bits(dx, expected[0], "dx")
    if dw:
        assert_same_bits(dw[0], expected[1], "drow_weight")


def test_silu_and_mul_before_its_rounding(isa):
    """The gradient of a row's weight is the fp32 value itself where a row holds one element and dy is 1.

    Weighted so that its product is about a tie of bf16, the output too is decided by the value's last bit.
    """
    x, weight = hashed(999, 2, seed=1) * 8, torch.ones(999, requires_grad=True)
    (value,) = torch.autograd.grad(kernels.silu_and_mul(x, row_weight=weight).sum(), weight)
    expected = ref_activation.silu_and_mul_backward(f32(x), np.ones((999, 1), np.float32), f32(weight))[1]
    assert_same_bits(value, expected, "value")
    weight = (1 + 2.0**-8) / torch.from_numpy(expected)
    assert_same_bits(kernels.silu_and_mul(x, row_weight=weight), ref_activation.silu_and_mul(f32(x), f32(weight)), "y")
    # the weight comes last: its product with u would overflow
    y = kernels.silu_and_mul(torch.tensor([[2.0**-60, 2.0**100]]).bfloat16(), row_weight=torch.tensor([2.0**60]))
    assert y.tolist() == [[2.0**99]]


HEADS = [(64, 64, 3, 1), (64, 64, 8, 1), (80, 80, 2, 2), (96, 96, 4, 1), (128, 128, 16, 1), (192, 128, 2, 1),
         (256, 256, 4, 2)]  # fmt: skip


def cancelling(q, k, v, dout):
    """Gradients that lose the low bits of what was added before, so that bf16 shows the order, in place.

    Two keys' shares of dQ are large and nearly opposite, and so are two heads' shares of dK and dV.
    """
    pairs = len(k[1::8])
    k[1::8], v[::8] = k[::8][:pairs], v[::8] * 2.0**12
    v[1::8] = -v[::8][:pairs]
    if q.shape[1] > k.shape[1]:
        q[:, 1], dout[::2, 0] = q[:, 0], dout[::2, 0] * 2.0**12
        dout[::2, 1] = -dout[::2, 0]


@functools.cache
def attention_case(dim, v_dim, heads, kv_heads, causal, window, sink):
    """(bounds of the sequences, options, leaves, dout, what the reference expects): slow, and one for all CPUs."""
    lengths = [1, 13, 0, 70] if (dim, heads) == (64, 3) else [1, 9]
    bounds = np.cumsum([0, *lengths]).tolist()
    leaves = [
        hashed(bounds[-1], h, d, seed=s) for s, (h, d) in enumerate(((heads, dim), (kv_heads, dim), (kv_heads, v_dim)))
    ]
    dout, sinks = hashed(bounds[-1], heads, v_dim, seed=99), hashed(heads, seed=4).float() if sink else None
    cancelling(*leaves, dout)
    options = {"scale": dim**-0.5, "causal": causal, "window": window}
    parts = []
    for a, b in itertools.pairwise(bounds):
        if a < b:
            part = [f32(t[a:b]) for t in leaves]
            out, lse = ref_attention.attention(*part, **options, sinks=f32(sinks) if sink else None)
            parts.append((out, *ref_attention.attention_backward(*part, out, lse, f32(dout[a:b]), **options), lse))
    *expected, lse = (np.concatenate(each) for each in zip(*parts, strict=True))
    if sink:
        expected.append(ref_attention.sink_gradient(expected[0], lse, f32(dout), f32(sinks)))
        leaves.append(sinks)
    return bounds, options, [t.requires_grad_() for t in leaves], dout, expected


@pytest.mark.parametrize(("dim", "v_dim", "heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("causal", "window", "sink"), [(True, 0, False), (True, 5, True), (False, 0, False)])
def test_attention_varlen(isa, dim, v_dim, heads, kv_heads, causal, window, sink):
    bounds, options, leaves, dout, expected = attention_case(dim, v_dim, heads, kv_heads, causal, window, sink)
    options = options | {"window": window or None, "sinks": leaves[3] if sink else None}
    out = kernels.attention_varlen(*leaves[:3], torch.tensor(bounds, dtype=torch.int32), **options)
    got = (out, *torch.autograd.grad(out, leaves, dout))
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, expected, strict=False):
        assert_same_bits(a, b, name)
    assert len(got) == len(expected)


def test_attention_products_flush_as_linear_does(isa):
    """Scores follow R1 into subnormals, which a scale of 2^126 shows: zeros where single fmas would keep a trace."""
    q, k, v = (hashed(9, 1, 64, seed=s) * small for s, small in ((1, 2.0**-62), (2, 2.0**-66), (3, 1)))
    out = kernels.attention_varlen(q, k, v, torch.tensor([0, 9], dtype=torch.int32), scale=2.0**126)
    assert_same_bits(out, ref_attention.attention(f32(q), f32(k), f32(v), scale=2.0**126)[0], "out")


def test_attention_gradients_against_float64(isa):
    """Sinks, window and grouped heads: autograd of the same function in float64."""
    n, heads, window = 40, 4, 16
    leaves = [hashed(n, h, 64, seed=s).requires_grad_() for h, s in ((heads, 1), (2, 2), (2, 3))]
    leaves.append(hashed(heads, seed=4).requires_grad_())
    cu = torch.tensor([0, n], dtype=torch.int32)
    out = kernels.attention_varlen(*leaves[:3], cu, scale=0.3, window=window, sinks=leaves[3])
    q, k, v, sinks = wide = [t.detach().double().requires_grad_() for t in leaves]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * 0.3
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    p = torch.softmax(torch.cat([scores, sinks[:, None, None].expand(heads, n, 1)], -1), -1)[..., :-1]
    expected = torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(2, 1))
    assert (out.double() - expected).abs().max() < 2**-8 * 1.5
    dout = hashed(n, heads, 64, seed=9)
    got, want = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, wide, dout.double())
    for name, a, b in zip(("dq", "dk", "dv", "dsinks"), got, want, strict=True):
        assert (a.double() - b).abs().max() < 0.02 * b.abs().max(), name


@functools.cache
def attention_around_a_segment(n, window):
    """(q, k, v, rows, their outputs): rows whose windows hold about as many keys of either segment; all are ties."""
    q, k, v = (hashed(n, 1, 64, seed=s) for s in (1, 2, 3))
    tie(k, v)
    q, rows, arrays = q * 4, list(range(n - window + 9, n, 4)), (f32(k[:, 0]), f32(v[:, 0]))
    outputs = [ref_attention.attend_row(f32(q[r, 0]), *arrays, r + 1 - window, r + 1, 0.25)[0] for r in rows]
    return q, k, v, rows, arith.bf16(np.stack(outputs))


def test_attention_across_segments(isa):
    window = 140
    q, k, v, rows, expected = attention_around_a_segment(1024 + window, window)
    cu = torch.tensor([0, len(q)], dtype=torch.int32)
    out = kernels.attention_varlen(q, k, v, cu, scale=0.25, window=window)
    assert_same_bits(out[rows, 0], expected, "rows")


SAMPLING = [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.9, 0), (0.8, 1.0, 5), (0.6, 0.5, 20), (1.0, 1e-6, 0)]


@pytest.mark.parametrize("vocab", [3, 8, 300, 2500])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SAMPLING)
def test_selected_logprob(isa, vocab, temperature, top_p, top_k):
    rows, width = 5, 24
    hidden, w = hashed(rows, width, seed=1).requires_grad_(), hashed(vocab, width, seed=2).requires_grad_()
    logits = ref_linear.linear(f32(hidden), f32(w), round_output=False)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    targets = [ref_sampling.sample_row(z, seed=7, position=i, **options) for i, z in enumerate(logits)]
    got = kernels.selected_logprob(hidden, w, torch.tensor(targets), **options, entropy=True)
    expected = [ref_logprob.logprob_row(z, t, **options) for z, t in zip(logits, targets, strict=True)]
    assert_same_bits(got.logprob, np.array([e[0] for e in expected]), "logprob")
    assert_same_bits(got.entropy, np.array([e[1] for e in expected]), "entropy")
    from_logits = kernels.logprob_from_logits(torch.from_numpy(logits), torch.tensor(targets), **options)
    assert_same_bits(from_logits, got.logprob, "from logits")
    grad = np.array([0.5, -2.0, 0.0, 1.0, 3.0], np.float32)
    dhidden, dw = torch.autograd.grad(got.logprob, (hidden, w), torch.from_numpy(grad))
    dz = np.stack(
        [ref_logprob.logits_gradient(z, t, g, **options) for z, t, g in zip(logits, targets, grad, strict=True)]
    )
    assert_same_bits(dhidden, arith.bf16(ref_logprob.hidden_gradient(dz, f32(w))), "dhidden")
    assert_same_bits(dw, arith.bf16(arith.chain(dz.T, f32(hidden))), "dw")


@functools.cache
def many_gradients(rows, vocab, width):
    """(hidden, head, targets, gradients of the log-probabilities, temperature, expected d hidden and d head, fp32)."""
    hidden, w = hashed(rows, width, seed=1) * 2, hashed(vocab, width, seed=2) * 2
    targets, grad, temperature = torch.arange(rows) * 7 % vocab, hashed(rows, seed=3).float(), 1.3
    logits = ref_linear.linear(f32(hidden), f32(w), round_output=False)
    pairs = zip(logits, targets, f32(grad), strict=True)
    dz = np.stack([ref_logprob.logits_gradient(z, int(t), float(g), temperature) for z, t, g in pairs])
    return (
        hidden,
        w,
        targets,
        grad,
        temperature,
        ref_logprob.hidden_gradient(dz, f32(w)),
        arith.chain(dz.T, f32(hidden)),
    )


def test_gradients_of_log_probabilities_in_fp32(isa):
    """Enough entries of d logits for a rounding too many to show in bf16, and both products before their rounding."""
    hidden, w, targets, grad, temperature, dhidden, dhead = many_gradients(200, 2500, 2)
    rows = len(hidden)
    options = [torch.full((rows,), temperature), torch.ones(rows), torch.zeros(rows, dtype=torch.int32)]
    state, cut, cut_index = torch.empty(rows, 2), torch.empty(rows), torch.empty_like(targets)
    ops.selected_logprob(hidden, w, targets, *options, torch.empty(rows), None, state, cut, cut_index)
    got, head = torch.zeros(hidden.shape), torch.zeros(w.shape)
    saved = (hidden, w, targets, options[0], state, cut, cut_index)
    ops.selected_logprob_backward(*saved, len(w), 0, 1, grad, got, head)
    assert_same_bits(got, dhidden, "dhidden")
    assert_same_bits(head, dhead, "dhead")


def test_the_cut_to_the_last_bit(isa):
    logits, targets, top_p = cut_edges()
    got = kernels.logprob_from_logits(logits, targets, top_p=top_p)
    expected = [
        ref_logprob.logprob_row(f32(z), int(t), 1.0, float(p))[0]
        for z, t, p in zip(logits, targets, top_p, strict=True)
    ]
    assert_same_bits(got, np.array(expected), "logprob")
    assert got.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [*SAMPLING, (0.0, 1.0, 0)])
def test_sample(isa, temperature, top_p, top_k):
    logits = f32(hashed(12, 700, seed=3)) * np.float32(6)
    logits[3, 100:110] = logits[3].max() + 1  # ties
    seeds, positions = np.arange(12) * (1 << 33) - 5, np.arange(12) * (1 << 34) + (1 << 31)
    # all keys 0 at temperature 1: each of the noise's bits counts
    logits[5] = -ref_sampling.gumbel(700, int(seeds[5]), int(positions[5]))
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    got = kernels.sample(
        torch.from_numpy(logits), seed=torch.from_numpy(seeds), position=torch.from_numpy(positions), **options
    )
    expected = [
        ref_sampling.sample_row(z, int(s), int(p), **options) for z, s, p in zip(logits, seeds, positions, strict=True)
    ]
    assert got.token.tolist() == expected
    scored = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    assert_same_bits(
        got.logprob,
        np.array([ref_logprob.logprob_row(z, t, **scored)[0] for z, t in zip(logits, expected, strict=True)]),
        "logprob",
    )
    assert_same_bits(
        got.raw_logprob,
        np.array([ref_logprob.logprob_row(z, t)[0] for z, t in zip(logits, expected, strict=True)]),
        "raw",
    )


def test_sample_from_hidden_states_is_sampling_from_their_logits(isa):
    hidden, head = hashed(7, 40, seed=1), hashed(300, 40, seed=2)
    seed, position = torch.arange(7), torch.arange(7) + 3
    logits = kernels.linear(hidden, head, out_dtype=torch.float32)
    got = kernels.sample(hidden, head=head, seed=seed, position=position, temperature=0.6, top_p=0.9)
    wanted = kernels.sample(logits, seed=seed, position=position, temperature=0.6, top_p=0.9)
    assert got.token.tolist() == wanted.token.tolist()
    assert_same_bits(got.logprob, wanted.logprob, "logprob")
    with pytest.raises(ValueError, match=r"linear: x \(7, 40\) does not fit w"):
        kernels.sample(hidden, head=head[:, :39].contiguous(), seed=seed, position=position)


def test_sample_follows_the_distribution():
    """A chi-square-like bound on 20,000 draws of a 6-way distribution: the sampler samples what the log-prob says."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5, -3.0]]).expand(20000, 6).contiguous()
    token = kernels.sample(logits, seed=torch.full((20000,), 3), position=torch.arange(20000)).token
    counts = torch.bincount(token, minlength=6).double() / 20000
    p = torch.softmax(logits[0].double(), 0)
    assert ((counts - p) ** 2 / p).sum() * 20000 < 25  # 5 degrees of freedom: exceeded once in 7,000 seeds
