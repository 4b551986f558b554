"""Attention in Triton's interpreter, run by ``test_interpreter.py``; matrix steps as in ``interpreter_cases.py``.

Outputs and gradients have the bits of ``attention_profile.py``. It is held to the CPU profile's reference: equal lse
shows products, masks, blocks, tree, merge and sink; outputs and gradients are close, since only this profile rounds
probabilities.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import attention_profile
import interpreter_cases  # noqa: F401 - it makes tl.dot a chain and watches memory
from data import assert_same_bits, f32, hashed, tie

from zerokl.kernels.reference import arith
from zerokl.kernels.reference import attention as ref_attention
from zerokl.kernels.triton import attention, attention_backward, attention_split
from zerokl.kernels.triton.attention_config import SplitConfig, split_config

triton = pytest.importorskip("triton")
tl = triton.language

NAN = float("nan")
SEGMENT = 128  # in place of 1,024, so that short sequences have several


@pytest.fixture
def short_segments(monkeypatch):
    for module in (attention, attention_split):
        monkeypatch.setattr(module, "SEGMENT", tl.constexpr(SEGMENT))
    monkeypatch.setattr(ref_attention, "SEGMENT", SEGMENT)


def _attention(q, k, v, cu, scale, causal=True, window=0, sinks=None):
    out, lse = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype), torch.empty(q.shape[:2])
    attention.attention_varlen(q, k, v, torch.tensor(cu, dtype=torch.int32), scale, causal, window, sinks, out, lse)
    return out, lse


def _reference_attention(q, k, v, cu, scale, causal=True, window=0, sinks=None):
    options = {"scale": scale, "causal": causal, "window": window, "sinks": None if sinks is None else f32(sinks)}
    parts = [
        ref_attention.attention(*(f32(x[a:b]) for x in (q, k, v)), **options)
        for a, b in itertools.pairwise(cu)
        if b > a
    ]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def _close(actual, expected):
    return np.abs(f32(actual) - expected).max() < 2.0**-7 * max(1, np.abs(expected).max())


def check_forward(out, lse, q, k, v, cu, **options):
    """Packed out and lse have this profile's bits; lse those of every profile, and out is close to the CPU's."""
    expected, expected_lse = _reference_attention(q, k, v, cu, **options)
    assert_same_bits(lse, expected_lse, "lse")
    assert _close(out, expected)
    sinks = options.pop("sinks", None)
    for a, b in itertools.pairwise(cu):
        if b > a:
            parts = [f32(x[a:b]) for x in (q, k, v)]
            expected, _ = attention_profile.attention(*parts, sinks=None if sinks is None else f32(sinks), **options)
            assert_same_bits(out[a:b], expected, "out")


def check_gradients(got, q, k, v, cu, out, lse, dout, **options):
    """Packed dq, dk, dv have this profile's bits and are close to the CPU's."""
    for a, b in itertools.pairwise(cu):
        if b > a:
            parts = [f32(x[a:b]) for x in (q, k, v, out, lse, dout)]
            near = ref_attention.attention_backward(*parts, **options)
            equal = attention_profile.attention_backward(*parts, **options)
            for name, x, y, z in zip("qkv", got, near, equal, strict=True):
                assert _close(x[a:b], y), f"d{name}"
                assert_same_bits(x[a:b], z, f"d{name}")


def _attention_gradients(q, k, v, cu, out, lse, dout, scale, causal=True, window=0, sinks=None):
    """dq, dk, dv, and the sinks' if there are any."""
    grads = [torch.empty_like(x) for x in (q, k, v)]
    rows, dsinks = (None, None) if sinks is None else (torch.empty_like(lse), torch.empty_like(sinks))
    cu = torch.tensor(cu, dtype=torch.int32)
    saved = (q, k, v, cu, scale, causal, window, sinks, out, lse, dout)
    attention_backward.attention_backward(*saved, *grads, rows, dsinks)
    return grads if sinks is None else [*grads, dsinks]


def _pages(k, v, lens, page_size):
    """Packed k, v [sum(lens), Hk, D or DV] on scattered pages among NaN: (k_cache, v_cache, table, lens)."""
    width = -(-max(lens) // page_size)
    order = torch.randperm(len(lens) * width, generator=torch.Generator().manual_seed(1)).int().reshape(-1, width)
    caches = [torch.full((order.numel(), page_size, *x.shape[1:]), NAN, dtype=x.dtype) for x in (k, v)]
    row = 0
    for b, length in enumerate(lens):
        for p in range(length):
            for cache, x in zip(caches, (k, v), strict=True):
                cache[order[b, p // page_size], p % page_size] = x[row]
            row += 1
    return *caches, order, torch.tensor(lens, dtype=torch.int32)


def _paged(q, pages, last, scale, window=0, sinks=None):
    """The last ``last[b]`` queries of each sequence, packed in q."""
    out = torch.empty(*q.shape[:2], pages[1].shape[3], dtype=q.dtype)
    attention.attention_paged(q, *pages, torch.tensor(last, dtype=torch.int32), scale, window, sinks, out)
    return out


def _last_rows(lens, last):
    """Where the last rows of packed sequences lie."""
    ends = np.cumsum(lens)
    return [row for end, n in zip(ends, last, strict=True) for row in range(end - n, end)]


@pytest.fixture
def attention_inputs():
    cu = [0, 70, 70, 75, 80]
    q, k, v = hashed(80, 4, 24, seed=1), hashed(80, 2, 24, seed=2), hashed(80, 2, 24, seed=3)
    return q * 4, k, v, cu


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (False, 0), (True, 9)])
def test_forward_and_backward(attention_inputs, causal, window):
    q, k, v, cu = attention_inputs
    options = {"scale": 0.2, "causal": causal, "window": window}
    out, lse = _attention(q, k, v, cu, **options)
    check_forward(out, lse, q, k, v, cu, **options)
    dout = hashed(*q.shape, seed=4)
    got = _attention_gradients(q, k, v, cu, out, lse, dout, **options)
    check_gradients(got, q, k, v, cu, out, lse, dout, **options)


DIMS = [(40, 24, 2, 2), (80, 80, 2, 2), (96, 96, 4, 1), (128, 128, 16, 1), (192, 128, 2, 1), (256, 256, 2, 1)]


@pytest.mark.parametrize(("dim", "v_dim", "heads", "kv_heads"), DIMS)
def test_head_dims_with_sinks_and_a_window(dim, v_dim, heads, kv_heads):
    """Forward, backward and pages at each pair of head dims; the gradient of the sinks is every profile's."""
    cu, options = [0, 2, 11], {"scale": dim**-0.5, "window": 5, "sinks": hashed(heads, seed=4).float()}
    q, k = hashed(11, heads, dim, seed=1) * 4, hashed(11, kv_heads, dim, seed=2)
    v, dout = hashed(11, kv_heads, v_dim, seed=3), hashed(11, heads, v_dim, seed=5)
    out, lse = _attention(q, k, v, cu, **options)
    check_forward(out, lse, q, k, v, cu, **options)

    *got, dsinks = _attention_gradients(q, k, v, cu, out, lse, dout, **options)
    wanted = ref_attention.sink_gradient(f32(out), f32(lse), f32(dout), f32(options["sinks"]))
    assert_same_bits(dsinks, wanted, "dsinks")
    check_gradients(got, q, k, v, cu, out, lse, dout, scale=options["scale"], window=5)

    pages, last = _pages(k, v, [2, 9], 4), [1, 2]
    rows = _last_rows([2, 9], last)
    assert_same_bits(_paged(q[rows], pages, last, **options), out[rows], "paged")


@pytest.mark.parametrize("window", [0, 100])
def test_attention_merges_segments(short_segments, window):
    n, sinks = SEGMENT + 72, hashed(1, seed=4).float()
    q, k, v = hashed(n, 1, 16, seed=1) * 4, hashed(n, 1, 16, seed=2), hashed(n, 1, 16, seed=3)
    options = {"scale": 0.3, "window": window, "sinks": sinks}
    check_forward(*_attention(q, k, v, [0, n], **options), q, k, v, [0, n], **options)


def _either_way(monkeypatch, call):
    """call() with one program walking the keys, and with one for each segment."""
    results = []
    for split in (False, True):
        chosen = []

        def choose(*sizes, split=split, chosen=chosen):
            chosen.append(SplitConfig(sizes[-1] if split else 1))
            return chosen[-1]

        monkeypatch.setattr(attention, "split_config", choose)
        results.append(call())
        assert (chosen[-1].segments > 1) == split, "the sequences have several segments"
    return results


@pytest.mark.parametrize(("window", "dim", "v_dim"), [(0, 24, 24), (140, 40, 24)])
def test_split_decoding_equals_the_walk(short_segments, monkeypatch, window, dim, v_dim):
    """Lengths around a segment and over several, one and three queries: the same bytes either way, and in prefill."""
    lens, last = [SEGMENT - 1, SEGMENT, SEGMENT + 1, 3, 2 * SEGMENT + 5], [1, 1, 1, 3, 2]
    rows = _last_rows(lens, last)
    q, k = hashed(len(rows), 2, dim, seed=1) * 4, hashed(sum(lens), 1, dim, seed=2)
    v, sinks = hashed(sum(lens), 1, v_dim, seed=3), hashed(2, seed=4).float()
    pages, options = _pages(k, v, lens, 16), {"scale": 0.2, "window": window, "sinks": sinks}
    walked, split = _either_way(monkeypatch, lambda: _paged(q, pages, last, **options))
    assert_same_bits(split, walked, "split")
    # prefill of the longest sequence: its rows stand at the end
    n, count = lens[-1], last[-1]
    whole = torch.cat([hashed(n - count, 2, dim, seed=5), q[-count:]])
    out, _ = _attention(whole, k[-n:], v[-n:], [0, n], **options)
    assert_same_bits(split[-count:], out[-count:], "prefill")


def test_both_ways_merge_in_ascending_order(short_segments, monkeypatch):
    """Equal scores, so that states add up exactly: 2^30 - 2^30 + 3 is 3 in this order alone."""
    n = 2 * SEGMENT + 64
    k, v = torch.zeros(n, 1, 16, dtype=torch.bfloat16), torch.zeros(n, 1, 16, dtype=torch.bfloat16)
    v[5], v[SEGMENT + 70], v[2 * SEGMENT + 9] = 2.0**30, -(2.0**30), 3.0
    pages = _pages(k, v, [n], 32)
    for out in _either_way(monkeypatch, lambda: _paged(k[:1], pages, [1], 1.0)):
        assert_same_bits(out, np.full((1, 1, 16), arith.bf16(np.float32(3 / n))), "ascending")


def test_both_ways_merge_with_one_rounding(short_segments, monkeypatch):
    """Equal scores within a segment, so weights are 1, and ties: the bytes of the reference, by the merge alone."""
    n, count = 2 * SEGMENT, 24
    q, k, v = hashed(count, 1, 16, seed=1), torch.full((n, 1, 16), 0.5).bfloat16(), hashed(n, 1, 16, seed=3)
    k[SEGMENT:] = 0.25
    tie(k, v)
    pages, arrays = _pages(k, v, [n], 32), (f32(k[:, 0]), f32(v[:, 0]))
    expected = [ref_attention.attend_row(f32(q[i, 0]), *arrays, 0, n - count + i + 1, 0.7)[0] for i in range(count)]
    for out in _either_way(monkeypatch, lambda: _paged(q, pages, [count], 0.7)):
        assert_same_bits(out[:, 0], arith.bf16(np.stack(expected)), "merged")


def test_split_is_chosen_for_decoding_that_leaves_processors_idle():
    decode = {"tokens": 1, "heads": 32, "kv_heads": 8, "v_dim": 128, "sequences": 1, "segments": 32}
    assert split_config(**decode) == SplitConfig(32)
    assert split_config(**decode | {"tokens": 8, "sequences": 8}) == SplitConfig(32)
    for other in (
        {"segments": 1},
        {"tokens": 512},  # prefill
        {"tokens": 64, "sequences": 64},  # programs enough
        {"tokens": 2, "heads": 64, "segments": 1 << 14},  # more scratch than allowed
    ):
        assert split_config(**decode | other) == SplitConfig(1), other


@pytest.mark.parametrize("page_size", [1, 16])
def test_paged_attention_equals_packed(attention_inputs, page_size):
    """The last queries of each sequence over scattered pages: the bytes of the whole sequence's."""
    q, k, v, cu = attention_inputs
    whole, _ = _attention(q, k, v, cu, 0.2)
    lens, last = [70, 0, 5, 5], [3, 0, 1, 5]
    rows, (k_cache, v_cache, order, lengths) = _last_rows(lens, last), _pages(k, v, lens, page_size)
    assert_same_bits(_paged(q[rows], (k_cache, v_cache, order, lengths), last, 0.2), whole[rows], "paged")
    with pytest.raises(RuntimeError, match="attention_paged"):
        _paged(q[rows], (k_cache, v_cache, order + 1, lengths), last, 0.2)


def test_attention_does_not_see_later_nan(attention_inputs):
    q, k, v, cu = attention_inputs
    clean, _ = _attention(q, k, v, cu, 0.2)
    for spoilt in range(3):
        inputs = [q.clone(), k.clone(), v.clone()]
        inputs[spoilt][40], inputs[spoilt][60] = NAN, float("inf")
        out, _ = _attention(*inputs, cu, 0.2)
        others = [i for i in range(80) if (i not in (40, 60) if spoilt == 0 else (i < 40 or i >= 70))]
        assert_same_bits(out[others], clean[others], "row that does not see it")
        assert out[40].isnan().all()
        assert spoilt == 0 or out[40:70].isnan().all()


def test_scores_without_a_finite_maximum_are_nan_beside_a_sink_too():
    """As on the CPU: no key of row 1 has a score above -inf, and a sink does not hide it."""
    q = torch.full((2, 1, 16), 2.0**120).bfloat16()
    q[0] = 1.0
    out, lse = _attention(q, -q[[1, 1]], q, [0, 2], 1.0, sinks=torch.zeros(1))
    _, expected = _reference_attention(q, -q[[1, 1]], q, [0, 2], 1.0, sinks=torch.zeros(1))
    assert_same_bits(lse, expected, "lse")
    assert lse[1].isnan().all()
    assert out[1].isnan().all()


def test_keys_get_their_gradient_from_the_last_query_whose_window_holds_them():
    """Window 2: query 64, the first of its tile, is the last to see key 63, the last of its block."""
    q, k, v, dout = (hashed(66, 1, 16, seed=seed) for seed in (1, 2, 3, 4))
    out, lse = _attention(q, k, v, [0, 66], 0.2, window=2)
    got = _attention_gradients(q, k, v, [0, 66], out, lse, dout, 0.2, window=2)
    check_gradients(got, q, k, v, [0, 66], out, lse, dout, scale=0.2, window=2)


def test_the_last_bit_of_a_weight_and_of_its_gradient():
    """Pairs of tokens found by search: a p or ds lies so near a tie of bf16 that its last fp32 bit decides.

    In order: one product of ds moved, then the difference of a score and lse fused, seen in p and in ds.
    """
    cu, found = [0, 2, 4, 6], (71652, 444636, 1928024)
    q, k, v, dout = (torch.cat([hashed(2, 1, 16, seed=seed + i) for seed in found]) for i in range(4))
    out, lse = _attention(q, k, v, cu, 0.2)
    got = _attention_gradients(q, k, v, cu, out, lse, dout, 0.2)
    check_gradients(got, q, k, v, cu, out, lse, dout, scale=0.2)


def test_rows_past_the_last_query_do_not_reach_a_key_that_is_inf():
    """Its scores are -inf, so every query gives it nothing; a row of zeros would score NaN. It gives its query NaN."""
    q, k, v, dout = (hashed(3, 1, 16, seed=seed) for seed in (1, 2, 3, 4))
    q[..., 0], k[2, 0, 0] = -1.0, float("inf")
    out, lse = _attention(q, k, v, [0, 3], 0.2)
    dq, dk, dv = _attention_gradients(q, k, v, [0, 3], out, lse, dout, 0.2)
    assert (dk[2] == 0).all()
    assert (dv[2] == 0).all()
    assert dq[2].isnan().all()  # 0 times Inf
    assert dq[:2].isfinite().all()


def test_attention_backward_equals_reference_where_rounding_is_exact():
    """One key: p = 1 and ds = 0, so the order over (query, head) decides every bit of dv."""
    q, k, v = hashed(40, 4, 16, seed=1), hashed(40, 1, 16, seed=2), hashed(40, 1, 16, seed=3)
    out, lse = _attention(q, k, v, [0, 40], 0.2, window=1)
    dout = hashed(40, 4, 16, seed=4, kind="wide")
    _, _, dv = _attention_gradients(q, k, v, [0, 40], out, lse, dout, 0.2, window=1)
    pairs = [arith.chain(np.ones((1, 4), dtype=np.float32), f32(dout[t])) for t in range(40)]
    assert_same_bits(dv, arith.bf16(np.stack(pairs)), "dv")


def test_value_gradients_add_queries_in_order():
    """64 equal scores: weights are 2^-6 exactly, so the order over tiles of (query, head) decides every bit of dv."""
    q, k, v = torch.zeros(64, 2, 16).bfloat16(), hashed(64, 1, 16, seed=2), hashed(64, 1, 16, seed=3)
    out, lse = _attention(q, k, v, [0, 64], 0.2, causal=False)
    dout = hashed(64, 2, 16, seed=4)
    dout[40] *= 2.0**22
    dout[41] = -dout[40]  # what was added before loses its low bits
    _, _, dv = _attention_gradients(q, k, v, [0, 64], out, lse, dout, 0.2, causal=False)
    expected = arith.bf16(arith.chain(np.full((1, 128), 2.0**-6, np.float32), f32(dout).reshape(128, 16)))
    assert_same_bits(dv[:, 0], np.broadcast_to(expected, (64, 16)), "dv")


def test_query_gradients_add_keys_in_order():
    """128 equal scores and D = 0: the weights of dq are powers of two, so the order over keys decides every bit."""
    q, k, v = torch.zeros(128, 1, 16).bfloat16(), hashed(128, 1, 16, seed=2), torch.zeros(128, 1, 16).bfloat16()
    v[::2, 0, 0], v[1::2, 0, 0] = 1.0, -1.0
    v[20, 0, 0], v[21, 0, 0], k[21] = 2.0**20, -(2.0**20), k[20]  # what was added before loses its low bits
    out, lse = _attention(q, k, v, [0, 128], 0.5, causal=False)
    dq, _, _ = _attention_gradients(q, k, v, [0, 128], out, lse, torch.ones_like(q), 0.5, causal=False)
    expected = arith.bf16(arith.chain(f32(v[None, :, 0, 0]) * np.float32(2.0**-8), f32(k[:, 0])))
    assert_same_bits(dq[:, 0], np.broadcast_to(expected, (128, 16)), "dq")


def test_attention_backward_beside_nan():
    """Sequences that do not hold the NaN keep their gradients, and so do queries before a spoilt key."""
    cu = [0, 20, 25]
    q, k, v, dout = (hashed(25, heads, 16, seed=seed) for seed, heads in ((1, 2), (2, 1), (3, 1), (4, 2)))

    def gradients(*inputs):
        return _attention_gradients(*inputs[:3], cu, *_attention(*inputs[:3], cu, 0.2), inputs[3], 0.2)

    clean = gradients(q, k, v, dout)
    for spoilt in range(4):
        inputs = [q.clone(), k.clone(), v.clone(), dout.clone()]
        inputs[spoilt][12] = NAN
        dq, dk, dv = gradients(*inputs)
        for got, expected in zip((dq, dk, dv), clean, strict=True):
            assert_same_bits(got[20:], expected[20:], "the other sequence")
        assert_same_bits(dq[:12], clean[0][:12], "earlier queries")
        if spoilt in (0, 3):
            # a query's NaN reaches the keys it sees, none behind it
            assert_same_bits(dk[13:], clean[1][13:], "later keys")
            assert_same_bits(dv[13:], clean[2][13:], "later keys")
            assert dv[:13].isnan().all()


def test_a_nan_in_the_second_tile_leaves_the_first_ones_queries_alone():
    cu = [0, 66, 69]
    q, k, v, dout = (hashed(69, 1, 16, seed=seed) for seed in (1, 2, 3, 4))
    out, lse = _attention(q, k, v, cu, 0.2)
    clean = _attention_gradients(q, k, v, cu, out, lse, dout, 0.2)
    dout[65] = NAN
    dq, dk, dv = _attention_gradients(q, k, v, cu, out, lse, dout, 0.2)
    assert_same_bits(dq[:65], clean[0][:65], "earlier queries")
    for got, expected in zip((dq, dk, dv), clean, strict=True):
        assert_same_bits(got[66:], expected[66:], "the other sequence")
    assert dk[:66].isnan().all()
    assert dv[:66].isnan().all()
