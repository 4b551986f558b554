"""R0: an output row depends on its own inputs only, whatever shares the call, its cut, its pages or its threads."""

import itertools

import numpy as np
import pytest
import torch
from data import assert_same_bits, hashed, tie

from zerokl import kernels

NAN, INF = float("nan"), float("inf")


def row_ops():
    w = hashed(70, 90, seed=1)
    head = hashed(500, 90, seed=2)
    table = kernels.rotary_table(400, 30, 1e4)
    norm = hashed(90, seed=3)
    up = hashed(180, 90, seed=4)

    def rotary(x):
        q = x.reshape(-1, 3, 30)
        return kernels.rotary(q, q, torch.full((len(q),), 9), table)[0].flatten(1)

    return {
        "linear": lambda x: kernels.linear(x, w),
        "linear fp32, segments": lambda x: kernels.linear(
            x[:, :88], w[:, :88].contiguous(), segments=2, out_dtype=torch.float32
        ),
        "rms_norm": lambda x: kernels.rms_norm(x, norm, 1e-5),
        "rms_norm residual": lambda x: torch.cat(kernels.rms_norm(x, norm, 1e-5, residual=x), -1),
        "silu_and_mul": lambda x: kernels.silu_and_mul(kernels.linear(x, up)),
        "rotary": rotary,
        "selected_logprob": lambda x: kernels.selected_logprob(
            x, head, torch.full((len(x),), 77), temperature=0.7
        ).logprob[:, None],
        "selected_logprob top-p": lambda x: kernels.selected_logprob(
            x, head, torch.full((len(x),), 77), top_p=0.9
        ).logprob[:, None],
        "sample": lambda x: kernels.sample(
            kernels.linear(x, head, out_dtype=torch.float32),
            seed=torch.full((len(x),), 5),
            position=torch.full((len(x),), 6),
        ).logprob[:, None],
    }


@pytest.mark.parametrize("name", row_ops())
def test_alone_equals_batched_permuted_split_and_poisoned(isa, name):
    op = row_ops()[name]
    x = hashed(61, 90, seed=5, kind="cancel")
    whole = op(x)
    for i in range(len(x)):
        assert_same_bits(op(x[i : i + 1])[0], whole[i], f"row {i} alone")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    assert_same_bits(op(x[order]), whole[order], "permuted")
    assert_same_bits(torch.cat([op(p) for p in x.split([1, 11, 13, 36])]), whole, "split")
    poisoned = x.clone()
    poisoned[::2] = torch.tensor([NAN, INF, -INF]).bfloat16().repeat(30)
    assert_same_bits(op(poisoned)[1::2], whole[1::2], "poisoned neighbours")
    torch.set_num_threads(1)
    assert_same_bits(op(x), whole, "one thread")


def test_gradients_recorded_or_not():
    x, w = hashed(9, 64, seed=1), hashed(33, 64, seed=2)
    with torch.no_grad():
        plain = kernels.linear(x, w)
    assert_same_bits(kernels.linear(x.requires_grad_(), w.requires_grad_()), plain, "linear")


def paged(k, v, page, shuffle):
    """k, v [n, Hk, D] spread over shuffled pages of a larger cache full of NaN: (k_cache, v_cache, page table)."""
    count = -(-len(k) // page)
    pages = np.random.default_rng(shuffle).permutation(count + 5)[:count]
    caches = []
    for t in (k, v):
        cache = torch.full((count + 5, page, *t.shape[1:]), NAN, dtype=t.dtype)
        for i, p in enumerate(pages):
            part = t[i * page : (i + 1) * page]
            cache[p, : len(part)] = part
        caches.append(cache)
    return *caches, torch.from_numpy(pages.astype(np.int32))[None]


@pytest.mark.parametrize("page", [1, 16, 64, 256])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 1023, 1024, 1025, 1100])
def test_prefill_chunks_decode_and_prefix_hits_agree(page, n):
    """Full sequence == chunked prefill == one-token decode == continuation after a cached prefix, on any pages."""
    heads, kv, dim, scale = 3, 1, 64, 0.125
    q, k, v = hashed(n, heads, dim, seed=1), hashed(n, kv, dim, seed=2), hashed(n, kv, dim, seed=3)
    tie(k, v)
    whole = kernels.attention_varlen(q, k, v, torch.tensor([0, n], dtype=torch.int32), scale=scale)
    k_cache, v_cache, table = paged(k, v, page, shuffle=n)

    check_calls_agree(n, whole, lambda begin, end: page_call(q, k_cache, v_cache, table, begin, end, scale=scale))


@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "dim", "v_dim"),
    [
        (1, 4, 2, 192, 128),
        (65, 4, 2, 192, 128),
        (1025, 4, 2, 192, 128),
        (130, 8, 1, 64, 64),
        (130, 3, 3, 80, 80),
        (130, 4, 1, 96, 96),
        (130, 16, 1, 128, 128),
        (130, 2, 1, 256, 256),
    ],
)
def test_windows_sinks_head_dims_and_groups_agree_too(n, heads, kv_heads, dim, v_dim):
    q, k, v = (
        hashed(n, h, d, seed=s, kind=kind)
        for s, (h, d, kind) in enumerate(
            [(heads, dim, "plain"), (kv_heads, dim, "plain"), (kv_heads, v_dim, "cancel")], start=1
        )
    )
    sinks = hashed(heads, seed=4)
    sinks[0] = -200.0  # adds exactly nothing, which keeps that head's ties
    tie(k, v)
    options = {"scale": 0.07, "window": 100, "sinks": sinks}
    whole = kernels.attention_varlen(q, k, v, torch.tensor([0, n], dtype=torch.int32), **options)
    k_cache, v_cache, table = paged(k, v, 16, shuffle=n)
    check_calls_agree(n, whole, lambda begin, end: page_call(q, k_cache, v_cache, table, begin, end, **options))


def page_call(q, k_cache, v_cache, table, begin, end, **options):
    lens, queries = torch.tensor([end], dtype=torch.int32), torch.tensor([end - begin], dtype=torch.int32)
    return kernels.attention_paged(q[begin:end], k_cache, v_cache, table, lens, queries, **options)


def check_calls_agree(n, whole, call):
    assert_same_bits(call(0, n), whole, "one prefill")
    cuts = [0, *sorted({min(n, c) for c in (1, 37, 64, 65, 500, 1024)}), n]
    chunks = [call(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    assert_same_bits(torch.cat(chunks), whole, "chunked prefill")
    for i in sorted({0, n // 2, n - 1, max(0, n - 2)}):
        assert_same_bits(call(i, i + 1)[0], whole[i], f"decode of {i}")
    if n > 40:
        assert_same_bits(call(40, n), whole[40:], "after a prefix hit")


def test_paged_batches_and_neighbours():
    """Sequences of a batch do not see each other: NaN in one leaves the others' bits alone."""
    lens, new = [70, 5, 130], [1, 5, 66]
    heads, kv, dim = 4, 2, 64
    k_cache, v_cache = hashed(40, 16, kv, dim, seed=1), hashed(40, 16, kv, dim, seed=2)
    table = torch.arange(27, dtype=torch.int32).reshape(3, 9)
    q = hashed(sum(new), heads, dim, seed=3)

    def call(index):
        rows = np.cumsum([0, *new])
        part = torch.cat([q[rows[i] : rows[i + 1]] for i in index])
        pick = torch.tensor(index)
        out = kernels.attention_paged(
            part,
            k_cache,
            v_cache,
            table[pick],
            torch.tensor(lens, dtype=torch.int32)[pick],
            torch.tensor(new, dtype=torch.int32)[pick],
            scale=0.125,
        )
        return out.split([new[i] for i in index])

    together = call([0, 1, 2])
    for i in range(3):
        assert_same_bits(call([i])[0], together[i], f"sequence {i}")
    k_cache[9:18], v_cache[9:18] = NAN, NAN
    poisoned = call([2, 1, 0])
    assert_same_bits(poisoned[0], together[2], "2 beside NaN")
    assert_same_bits(poisoned[2], together[0], "0 beside NaN")
    assert poisoned[1].isnan().any()


def test_later_tokens_of_the_own_sequence_are_invisible():
    """Causality down to NaN: poison behind a position leaves it unchanged."""
    q, k, v = (hashed(100, 2, 64, seed=s) for s in (1, 2, 3))
    cu = torch.tensor([0, 100], dtype=torch.int32)
    clean = kernels.attention_varlen(q, k, v, cu, scale=0.125)
    for t in (q, k, v):
        t[50:] = NAN
    assert_same_bits(kernels.attention_varlen(q, k, v, cu, scale=0.125)[:50], clean[:50], "before the poison")


def test_backward_is_deterministic():
    """The same bits in repeated runs with a changing number of threads."""
    x, w = hashed(300, 96, seed=1), hashed(200, 96, seed=2)
    q, k, v = (hashed(300, h, 64, seed=s) for h, s in ((6, 3), (2, 4), (2, 5)))
    cu = torch.tensor([0, 100, 300], dtype=torch.int32)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, w, q, k, v)]
        out = kernels.attention_varlen(*leaves[2:], cu, scale=0.125).flatten(1)[:, :96]
        y = kernels.linear(leaves[0] + out, leaves[1])
        kernels.selected_logprob(y[:, :96].contiguous(), leaves[1], torch.arange(300) % 200).logprob.sum().backward()
        return [t.grad for t in leaves]

    first = run()
    for i in range(20):
        torch.set_num_threads(1 + i % 2)
        for a, b in zip(run(), first, strict=True):
            assert_same_bits(a, b, f"run {i}")


def test_fp32_torch_is_the_negative_control():
    """The check can fail: torch's fp32 product is not row-local at small M."""
    x, w = hashed(11, 576, seed=1).float(), hashed(576, 576, seed=2).float()
    whole = torch.nn.functional.linear(x, w)
    alone = torch.cat([torch.nn.functional.linear(x[i : i + 1], w) for i in range(11)])
    assert (whole != alone).any()


@pytest.mark.parametrize(("segments", "depth"), [(0, 12), (3, 12), (-2, 8), (4, 12), (2, 7)])
def test_segments_are_powers_of_two_that_cut_into_pairs(segments, depth):
    x, w, experts = hashed(4, depth, seed=1), hashed(3, depth, seed=2), hashed(2, 3, depth, seed=3)
    with pytest.raises(ValueError, match=rf"kernels\.linear: segments={segments} "):
        kernels.linear(x, w, segments=segments)
    with pytest.raises(ValueError, match=rf"kernels\.grouped_linear: segments={segments} "):
        kernels.grouped_linear(x, experts, torch.tensor([0, 1, 4]), segments=segments)


def test_errors_name_op_argument_and_support():
    x, w, seeds = hashed(4, 8, seed=1), hashed(3, 8, seed=2), torch.arange(4)
    for call, words in (
        (lambda: kernels.linear(x.float(), w), ["linear", "x is torch.float32", "bfloat16"]),
        (lambda: kernels.linear(x[:, :7], w), ["linear", "does not fit"]),
        (lambda: kernels.linear(x, w, segments=3), ["segments=3"]),
        (lambda: kernels.rms_norm(x, w, 1e-5), ["rms_norm", "does not fit"]),
        (lambda: kernels.silu_and_mul(x[:, :7]), ["silu_and_mul"]),
        (lambda: kernels.selected_logprob(x, w, torch.zeros(4), temperature=0.0), ["temperature"]),
        (lambda: kernels.sample(x.float(), seed=seeds, position=seeds, temperature=-1.0), ["sample", "temperature"]),
        (lambda: kernels.sample(x.float(), seed=seeds, position=seeds, top_p=0.0), ["sample", "top_p"]),
        (
            lambda: kernels.attention_varlen(x[:, None], x[:, None], x[:, None], torch.tensor([0, 3]), scale=1.0),
            ["cu_seqlens"],
        ),
        (
            lambda: kernels.attention_varlen(
                x[:, None], x[:, None], x[:, None], torch.tensor([0, 4]), scale=1.0, sinks=x
            ),
            ["sinks"],
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"zerokl\.kernels") as error:
            call()
        for word in words:
            assert word in str(error.value)
