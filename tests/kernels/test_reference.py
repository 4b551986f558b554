"""Every compiled op equals the scalar-order reference in every byte, on every instruction set, forward and backward."""

import itertools

import numpy as np
import pytest
import torch
from data import assert_same_bits, f32, hashed
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
    x, w = hashed(m, k, seed=1, kind=kind).requires_grad_(), hashed(n, k, seed=2, kind=kind).requires_grad_()
    b = hashed(n, seed=3) if bias else None
    y = kernels.linear(x, w, b, out_dtype=torch.float32 if fp32 else None)
    assert_same_bits(y, ref_linear.linear(f32(x), f32(w), None if b is None else f32(b), round_output=not fp32), "y")
    dy, (dx, dw) = gradients(y, x, w)
    expected_dx, expected_dw = ref_linear.linear_backward(
        f32(x), f32(w), arith.bf16(f32(dy)), np.zeros((n, k), np.float32)
    )
    assert_same_bits(dx, expected_dx, "dx")
    assert_same_bits(dw, arith.bf16(expected_dw), "dw")


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
    x, w, b = hashed(19, 8, seed=1), hashed(21, 8, seed=2), hashed(21, seed=3).requires_grad_()
    dy, (db,) = gradients(kernels.linear(x, w, b), b)
    expected = np.zeros(21, np.float32)
    for row in f32(dy):
        expected = expected + row
    assert_same_bits(db, arith.bf16(expected), "db")


def test_embedding(isa):
    ids, w = torch.tensor([3, 1, 3, 0, 3]), hashed(5, 70, seed=11).requires_grad_()
    y = kernels.embedding(ids, w)
    assert_same_bits(y, ref_linear.embedding(ids.numpy(), f32(w)), "y")
    dy, (dw,) = gradients(y, w)
    assert_same_bits(
        dw, arith.bf16(ref_linear.embedding_backward(ids.numpy(), f32(dy), np.zeros((5, 70), np.float32))), "dw"
    )
    with pytest.raises(RuntimeError, match="outside"):
        kernels.embedding(torch.tensor([5]), w)


@drawn
@given(rows=st.sampled_from([1, 3, 17, 33]), n=st.integers(1, 300), kind=KIND, residual=st.booleans())
def test_rms_norm(isa, rows, n, kind, residual):
    x, w = hashed(rows, n, seed=1, kind=kind).requires_grad_(), hashed(n, seed=2).requires_grad_()
    r = hashed(rows, n, seed=3, kind=kind) if residual else None
    eps = 1e-5
    out = kernels.rms_norm(x, w, eps, residual=r) if residual else (kernels.rms_norm(x, w, eps), None)
    y, s = ref_norm.rms_norm(f32(x), f32(w), eps, None if r is None else f32(r))
    assert_same_bits(out[0], y, "y")
    dy, ds = hashed(rows, n, seed=4), hashed(rows, n, seed=5)
    if residual:
        assert_same_bits(out[1], s, "sum")
        dx, dw = torch.autograd.grad(out, (x, w), (dy, ds))
    else:
        dx, dw = torch.autograd.grad(out[0], (x, w), dy)
    expected = ref_norm.rms_norm_backward(
        s, f32(w), eps, f32(dy), f32(ds) if residual else None, np.zeros(n, np.float32)
    )
    assert_same_bits(dx, expected[0], "dx")
    assert_same_bits(dw, arith.bf16(expected[1]), "dw")


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
    x = hashed(rows, 2 * n, seed=1, kind=kind).requires_grad_()
    weight = hashed(rows, seed=2).float().requires_grad_() if weighted else None
    y = kernels.silu_and_mul(x, row_weight=weight)
    w = None if weight is None else f32(weight)
    assert_same_bits(y, ref_activation.silu_and_mul(f32(x), w), "y")
    dy, (dx, *dw) = gradients(y, *((x,) if weight is None else (x, weight)))
    expected = ref_activation.silu_and_mul_backward(f32(x), f32(dy), w)
    assert_same_bits(dx, expected[0], "dx")
    if dw:
        assert_same_bits(dw[0], expected[1], "drow_weight")


@pytest.mark.parametrize(
    ("dim", "v_dim", "heads", "kv_heads"),
    [
        (64, 64, 3, 1),
        (64, 64, 8, 1),
        (80, 80, 2, 2),
        (96, 96, 4, 1),
        (128, 128, 16, 1),
        (192, 128, 2, 1),
        (256, 256, 4, 2),
    ],
)
@pytest.mark.parametrize(("causal", "window", "sink"), [(True, 0, False), (True, 5, True), (False, 0, False)])
def test_attention_varlen(isa, dim, v_dim, heads, kv_heads, causal, window, sink):
    lengths = [1, 13, 0, 70] if (dim, heads, window) == (64, 3, 0) else [1, 9]
    cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    total, scale = sum(lengths), dim**-0.5
    q, k, v = (
        hashed(total, h, d, seed=s, kind=kind).requires_grad_()
        for h, d, s, kind in ((heads, dim, 1, "plain"), (kv_heads, dim, 2, "wide"), (kv_heads, v_dim, 3, "cancel"))
    )
    sinks = hashed(heads, seed=4).requires_grad_() if sink else None
    out = kernels.attention_varlen(q, k, v, cu, scale=scale, causal=causal, window=window or None, sinks=sinks)
    dout, grads = gradients(out, *(t for t in (q, k, v, sinks) if t is not None))
    lses = []
    for a, b in itertools.pairwise(cu.tolist()):
        if a == b:
            continue
        part = [f32(t[a:b]) for t in (q, k, v)]
        options = {"scale": scale, "causal": causal, "window": window}
        expected, lse = ref_attention.attention(*part, **options, sinks=f32(sinks) if sink else None)
        assert_same_bits(out[a:b], expected, "out")
        lses.append(lse)
        backward = ref_attention.attention_backward(*part, expected, lse, f32(dout[a:b]), **options)
        for name, got, want in zip(("dq", "dk", "dv"), grads, backward, strict=False):
            assert_same_bits(got[a:b], want, name)
    if sink:
        want = ref_attention.sink_gradient(f32(out), np.concatenate(lses), f32(dout), f32(sinks))
        assert_same_bits(grads[3], arith.bf16(want), "dsinks")


@pytest.mark.parametrize("kind", ["wide", "tiny"])
def test_attention_products_flush_as_linear_does(isa, kind):
    """Scores follow R1 into subnormals: exact zeros where single fmas would keep a trace."""
    q, k, v = (hashed(9, 1, 64, seed=s, kind=kind) for s in (1, 2, 3))
    out = kernels.attention_varlen(q, k, v, torch.tensor([0, 9], dtype=torch.int32), scale=1.0)
    assert_same_bits(out, ref_attention.attention(f32(q), f32(k), f32(v), scale=1.0)[0], "out")


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


def test_attention_across_segments(isa):
    """A sequence longer than one 1,024-key segment: the last rows only, against the reference's merge."""
    n, scale = 1024 + 70, 0.25
    q, k, v = (hashed(n, 1, 64, seed=s) for s in (1, 2, 3))
    out = kernels.attention_varlen(q, k, v, torch.tensor([0, n], dtype=torch.int32), scale=scale)
    for row in (1022, 1023, 1024, 1025, n - 1):
        expected, _ = ref_attention.attend_row(f32(q[row, 0]), f32(k[:, 0]), f32(v[:, 0]), 0, row + 1, scale)
        assert_same_bits(out[row, 0], arith.bf16(expected), f"row {row}")


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


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [*SAMPLING, (0.0, 1.0, 0)])
def test_sample(isa, temperature, top_p, top_k):
    logits = f32(hashed(12, 700, seed=3)) * np.float32(6)
    logits[3, 100:110] = logits[3].max() + 1  # ties
    seeds, positions = np.arange(12) * (1 << 33) - 5, np.arange(12) + (1 << 31)
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
