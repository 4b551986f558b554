"""Attention, experts, scores and samples on shapes that hypothesis draws: every byte equals the reference."""

import functools
import itertools

import numpy as np
import torch
from data import assert_same_bits, f32, hashed, tie
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zerokl import kernels
from zerokl.kernels.ops._common import ops
from zerokl.kernels.reference import attention as ref_attention
from zerokl.kernels.reference import linear as ref_linear
from zerokl.kernels.reference import logprob as ref_logprob
from zerokl.kernels.reference import moe as ref_moe
from zerokl.kernels.reference import sampling as ref_sampling

KIND = st.sampled_from(["plain", "wide", "cancel", "tiny"])
drawn = settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@functools.cache
def attention_case(lengths, kv_heads, group, dims, mask, kind):
    """(bounds, options, (q, k, v), what the reference expects of the sequence at each bound); the last is all ties."""
    dim, v_dim = dims
    bounds = np.cumsum([0, *lengths]).tolist()
    options = {"scale": dim**-0.5, "causal": mask != "all", "window": mask if isinstance(mask, int) else 0}
    shapes = ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, v_dim))
    q, k, v = (hashed(bounds[-1], h, d, seed=s, kind=kind) for s, (h, d) in enumerate(shapes))
    tie(k[bounds[-2] :], v[bounds[-2] :])
    expected = {
        a: ref_attention.attention(*(f32(t[a:b]) for t in (q, k, v)), **options)
        for a, b in itertools.pairwise(bounds)
        if a < b
    }
    return bounds, options, (q, k, v), expected


@drawn
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 17, 63, 65]), min_size=1, max_size=3),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3, 7]),
    dims=st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (6, 10)]),
    mask=st.sampled_from(["all", "causal", 1, 7, 64]),
    kind=KIND,
)
@example(lengths=[17, 66], kv_heads=2, group=2, dims=(6, 10), mask=7, kind="plain")
@example(lengths=[66, 3], kv_heads=1, group=3, dims=(10, 6), mask="causal", kind="cancel")
@example(lengths=[5, 66], kv_heads=1, group=1, dims=(16, 16), mask="all", kind="plain")
def test_attention_varlen(isa, lengths, kv_heads, group, dims, mask, kind):
    """``mask``: all keys, those up to the query, or a window of so many. The examples alone reach every rule of R5."""
    bounds, options, (q, k, v), expected = attention_case(tuple(lengths), kv_heads, group, dims, mask, kind)
    cu, window = torch.tensor(bounds, dtype=torch.int32), options["window"]
    out = kernels.attention_varlen(q, k, v, cu, **options | {"window": window or None})
    # the sums of weights show in this alone: outputs are rounded
    lse = torch.empty(out.shape[:2])
    ops.attention_varlen(q, k, v, cu, options["scale"], options["causal"], window, None, torch.empty_like(out), lse)
    for a, b in itertools.pairwise(bounds):
        if a < b:
            assert_same_bits(out[a:b], expected[a][0], "out")
            assert_same_bits(lse[a:b], expected[a][1], "lse")


@drawn
@given(counts=st.lists(st.sampled_from([0, 0, 1, 3, 17, 65]), min_size=1, max_size=6), n=st.integers(1, 70),
       k=st.integers(1, 90), kind=KIND)  # fmt: skip
@example(counts=[17, 0, 65, 3], n=45, k=67, kind="cancel")
def test_grouped_linear(isa, counts, n, k, kind):
    offsets = np.cumsum([0, *counts])
    x = hashed(sum(counts), k, seed=1, kind=kind).requires_grad_()
    w = torch.nn.Parameter(hashed(len(counts), n, k, seed=2, kind=kind))
    y = kernels.grouped_linear(x, w, torch.tensor(offsets))
    assert_same_bits(y, ref_moe.grouped_linear(f32(x), f32(w), offsets), "y")
    # what bf16 hides: the low bits of a sum, and chains that go on from an earlier micro-batch's
    exact = kernels.grouped_linear(x, w, torch.tensor(offsets), out_dtype=torch.float32)
    assert_same_bits(exact, ref_moe.grouped_linear(f32(x), f32(w), offsets, round_output=False), "fp32")
    dy, start = hashed(*y.shape, seed=3), hashed(*w.shape, seed=4).float()
    w.main_grad = start.clone()
    y.backward(dy)
    dx, dw = ref_moe.grouped_linear_backward(f32(x), f32(w), offsets, f32(dy), f32(start))
    assert_same_bits(x.grad, dx, "dx")
    assert_same_bits(w.main_grad, dw, "dw")


@drawn
@given(
    rows=st.sampled_from([1, 3, 17]),
    vocab=st.integers(1, 700),
    width=st.integers(1, 60),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 40]),
)
def test_scores_and_samples(isa, rows, vocab, width, temperature, top_p, top_k):
    hidden, head = hashed(rows, width, seed=1, kind="cancel"), hashed(vocab, width, seed=2)
    logits = ref_linear.linear(f32(hidden), f32(head), round_output=False)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    seed, position = torch.arange(rows) * 7, torch.arange(rows) + 5
    got = kernels.sample(hidden, head=head, seed=seed, position=position, **options)
    tokens = [
        ref_sampling.sample_row(z, int(s), int(p), **options) for z, s, p in zip(logits, seed, position, strict=True)
    ]
    assert got.token.tolist() == tokens
    expected = np.array([ref_logprob.logprob_row(z, t, **options)[0] for z, t in zip(logits, tokens, strict=True)])
    assert_same_bits(got.logprob, expected, "sampled")
    scored = kernels.selected_logprob(hidden, head, got.token, **options)
    assert_same_bits(scored.logprob, expected, "scored")
    # samples are mostly the likeliest token, whose z - max is 0: any token, its last bits decided by each term
    targets = torch.arange(rows) * 31 % vocab
    scored = kernels.selected_logprob(hidden, head, targets, temperature=temperature)
    expected = [ref_logprob.logprob_row(z, t, temperature)[0] for z, t in zip(logits, targets, strict=True)]
    assert_same_bits(scored.logprob, np.array(expected), "any token")
