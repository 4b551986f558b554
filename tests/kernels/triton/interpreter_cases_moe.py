"""The kernels of mixture-of-experts layers against the CPU's operators, in Triton's interpreter."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from data import assert_same_bits, hashed
from interpreted import chain_matrix_steps
from memory import watch

from zerokl.kernels.ops._common import ops
from zerokl.kernels.triton import KERNELS, grouped_linear, router

chain_matrix_steps()
watch()
KINDS = ["plain", "wide", "cancel", "tiny"]
NAN = float("nan")


def same(name, inputs, outputs):
    """Runs the Triton kernel and the CPU's operator into copies of ``outputs``: equal bytes. Returns them."""
    got, expected = ([t.clone() for t in outputs] for _ in range(2))
    KERNELS[name](*inputs, *got)
    getattr(ops, name)(*inputs, *expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.dtype == torch.int64:
            assert torch.equal(a, b), f"{name} output {i}"
        else:
            assert_same_bits(a, b, f"{name} output {i}")
    return got


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [7, 300])
def test_row_weight(kind, n):
    x, dy, weight = hashed(5, 2 * n, seed=1, kind=kind), hashed(5, n, seed=2, kind=kind), hashed(5, seed=3).float()
    weight = weight * (1 + 2.0**-12)
    same("silu_and_mul", (x, weight), [torch.empty_like(dy)])
    (dx, _) = same("silu_and_mul_backward", (x, weight, dy), [torch.empty_like(x), torch.empty_like(weight)])
    alone = torch.empty_like(x)
    KERNELS["silu_and_mul_backward"](x, weight, dy, alone, None)
    assert_same_bits(alone, dx, "dx without the weight's gradient")


def test_row_weight_multiplies_last():
    """Before the product with u it would overflow."""
    x, weight = torch.tensor([[2.0**-60, 2.0**100]]).bfloat16(), torch.tensor([2.0**60])
    (y,) = same("silu_and_mul", (x, weight), [torch.empty(1, 1, dtype=torch.bfloat16)])
    assert y.isfinite().all()


GROUPS = {8: [(1, 1, 1)], 40: [(1, 1, 1), (4, 2, 2), (8, 3, 1)], 130: [(1, 1, 1), (26, 20, 7)]}


def logits_of(rows, experts):
    """fp32 logits with ties, both zeros, and rows that hold NaN and infinities."""
    z = hashed(rows, experts, seed=1).float() * 6 * (1 + 2.0**-12)
    z[:, 1::3] = z[:, 0::3][:, : z[:, 1::3].shape[1]]
    z[::2, 5::7], z[::2, 6::7] = 0.0, -0.0
    z[1, 2], z[2, 3], z[3, 1:3] = NAN, float("inf"), -float("inf")
    return z


@pytest.mark.parametrize(("experts", "groups"), [(e, g) for e, choices in GROUPS.items() for g in choices])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_router_topk(experts, groups, sigmoid, bias):
    rows, k, renormalize = 6, 3 if experts > 8 else 8, groups[0] != 8
    z, b = logits_of(rows, experts), hashed(experts, seed=9).float() if bias else None
    outputs = [torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)]
    _, index = same("router_topk", (z, b, sigmoid, *groups, renormalize, 2.5, False), outputs)
    dweight = hashed(rows, k, seed=3).float() * (1 + 2.0**-12)
    same("router_topk_backward", (z, index, dweight, sigmoid, renormalize, 2.5), [torch.empty_like(z)])


def test_ties_go_to_the_lower_index_and_nan_to_nobody():
    z = torch.zeros(3, 6)
    z[1, 2], z[2, :] = NAN, NAN
    bias = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, 1.0])
    weight, index = torch.empty(3, 4), torch.empty(3, 4, dtype=torch.int64)
    router.router_topk(z, bias, True, 1, 1, 1, True, 1.0, False, weight, index)
    assert index.tolist() == [[4, 5, 0, 1], [4, 5, 0, 1], [0, 1, 2, 3]]
    # the groups tie too: the first stays; with NaN in it, it is the last
    router.router_topk(z, None, True, 3, 2, 2, True, 1.0, False, weight, index)
    assert index.tolist() == [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 3]]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_router_replay(sigmoid):
    z = logits_of(6, 16)
    index = torch.tensor([[15, 0, 7]]).repeat(6, 1)
    options = (sigmoid, 1, 1, 1, True, 1.5, True)
    _, after = same("router_topk", (z, None, *options), [torch.empty(6, 3), index])
    assert torch.equal(after, index)
    for wrong, message in ((16, "outside"), (-1, "outside"), (15, "twice")):
        bad = index.clone()
        bad[4, 2] = wrong
        with pytest.raises(RuntimeError, match=f"zerokl::router_topk: .* {message}"):
            router.router_topk(z, None, *options, torch.empty(6, 3), bad)


def test_router_refuses_more_experts_than_a_program_holds():
    z, index = torch.zeros(1, 1025), torch.zeros(1, 2, dtype=torch.int64)
    weight = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="1025 experts; supported on CUDA: 1 to 1024"):
        router.router_topk(z, None, False, 1, 1, 1, True, 1.0, False, weight, index)
    with pytest.raises(ValueError, match="1025 experts; supported on CUDA: 1 to 1024"):
        router.router_topk_backward(z, index, weight, False, True, 1.0, z)


def test_router_beside_nan_rows():
    """R0, forward and backward."""
    clean = hashed(6, 24, seed=1).float() * 5
    dirty = clean.clone()
    dirty[1], dirty[4, 3] = NAN, float("inf")
    results = []
    for z in (clean, dirty):
        weight, index, dz = torch.empty(6, 3), torch.empty(6, 3, dtype=torch.int64), torch.empty_like(z)
        router.router_topk(z, None, False, 4, 2, 2, True, 1.0, False, weight, index)
        router.router_topk_backward(z, index, hashed(6, 3, seed=2).float(), False, True, 1.0, dz)
        results.append((weight, index.float(), dz))
    for a, b in zip(*results, strict=True):
        assert_same_bits(b[[0, 2, 3, 5]], a[[0, 2, 3, 5]], "row beside NaN")
    assert results[1][0][[1, 4]].isnan().all()


def routed(tokens, k, experts=7):
    """Distinct experts per token; expert 0 gets none."""
    rng = np.random.default_rng(1)
    return torch.from_numpy(np.stack([1 + rng.permutation(experts - 1)[:k] for _ in range(tokens)]))


def order(index, experts=7):
    rows = index.numel()
    empty = [torch.empty(n, dtype=torch.int64) for n in (experts + 1, rows)] + [torch.empty_like(index)]
    return same("moe_order", (index,), empty)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_order(tokens):
    index = routed(tokens, 3) if tokens else torch.empty(0, 3, dtype=torch.int64)
    order(index)
    # a token may name an expert twice: slot order
    order(torch.zeros_like(index))
    for wrong in (7, -1) if tokens else ():
        index[-1, -1] = wrong
        with pytest.raises(RuntimeError, match="zerokl::moe_permute"):
            KERNELS["moe_order"](index, torch.empty(8, dtype=torch.int64), *(torch.empty_like(index) for _ in range(2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "k", "n"), [(5, 3, 300), (3, 1, 7), (2, 6, 1100)])
def test_permute_and_combine(kind, tokens, k, n):
    index = routed(tokens, k)
    _, source, position = order(index)
    x, shared = hashed(tokens, n, seed=1, kind=kind), hashed(tokens, n, seed=2, kind=kind)
    (rows,) = same("moe_gather", (x, source, k), [torch.empty(tokens * k, n, dtype=torch.bfloat16)])
    y, dout = hashed(tokens * k, n, seed=3, kind=kind), hashed(tokens, n, seed=4, kind=kind)
    weight = hashed(tokens, k, seed=5).float() * (1 + 2.0**-12)
    for w, s in itertools.product((weight, None), (shared, None)):
        same("moe_combine", (y, position, w, s), [torch.empty_like(x)])
    same("moe_combine_backward", (y, position, weight, dout), [torch.empty_like(rows), torch.empty_like(weight)])


def test_combine_adds_in_slot_order():
    """The first two slots cancel and leave the third: any other order loses its low bits."""
    index = routed(4, 3)
    _, _, position = order(index)
    y = hashed(12, 40, seed=1)
    y[position[:, 0]] *= 2.0**20
    y[position[:, 1]] = -y[position[:, 0]]
    for weight in (torch.ones(4, 3), None):
        (out,) = same("moe_combine", (y, position, weight, None), [torch.empty(4, 40, dtype=torch.bfloat16)])
        assert_same_bits(out, y[position[:, 2]], "what is left")


def test_combine_rounds_once_a_slot():
    """Opposite rows of equal weight leave what the first product lost: nothing, were the second rounded too."""
    _, _, position = order(routed(4, 2))
    y, weight = hashed(8, 40, seed=1), (hashed(4, 1, seed=2).float() * (1 + 2.0**-20)).expand(4, 2).contiguous()
    y[position[:, 1]] = -y[position[:, 0]]
    (out,) = same("moe_combine", (y, position, weight, None), [torch.empty(4, 40, dtype=torch.bfloat16)])
    assert (out != 0).any()


def test_gradients_beside_nan_rows():
    """R0 where a program holds several rows: the row weight's and combine's backward."""
    x, dy, weight = hashed(6, 80, seed=1), hashed(6, 40, seed=2), hashed(6, 1, seed=3).float()
    position = torch.tensor([[3], [5], [0], [1], [4], [2]])
    results = []
    for spoilt in (1.0, NAN):
        x[1], dy[4] = x[1] * spoilt, dy[4] * spoilt
        dx, dw, dh, dv = torch.empty_like(x), torch.empty(6), torch.empty_like(dy), torch.empty(6, 1)
        KERNELS["silu_and_mul_backward"](x, weight.view(6), dy, dx, dw)
        KERNELS["moe_combine_backward"](x[:, :40].contiguous(), position, weight, dy, dh, dv)
        results.append((dx, dw, dh[position[:, 0]], dv))
    # token 3's row of y is row 1 of x
    for clean, dirty, bad in zip(*results, [[1, 4], [1, 4], [4], [3, 4]], strict=True):
        others = [i for i in range(6) if i not in bad]
        assert_same_bits(dirty[others], clean[others], "row beside NaN")
        assert dirty[bad].isnan().all()


COUNTS = [[0, 5, 17, 0, 14, 0], [33, 0, 0], [0, 0, 40], [4, 4, 4], [0, 0]]


@pytest.mark.parametrize("counts", [*COUNTS, [70, 0, 131]])
@pytest.mark.parametrize("segments", [1, 4])
def test_grouped_linear(counts, segments):
    """By the R1 chain in place of a matrix step, the CPU's bytes."""
    rows, k, n = sum(counts), 88 if segments > 1 else 43, 37
    offsets = torch.tensor(np.cumsum([0, *counts]))
    x, w = hashed(rows, k, seed=1, kind="cancel"), hashed(len(counts), n, k, seed=2)
    for dtype in (torch.bfloat16, torch.float32):
        same("grouped_linear", (x, w, offsets, segments), [torch.empty(rows, n, dtype=dtype)])
    if segments == 1:
        dy = hashed(rows, n, seed=3)
        same("grouped_linear_dx", (dy, w, offsets), [torch.empty_like(x)])
        # chains go on from what dw holds; an expert without rows keeps it
        same("grouped_linear_dw", (dy, x, offsets), [hashed(len(counts), n, k, seed=4, kind="wide").float()])


def test_grouped_linear_adds_segments_as_a_balanced_tree():
    """R2 with values whose sum depends on the order."""
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    x[:, ::2] = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24), 1.0, 2.0**24, 5.0, -(2.0**24)]).bfloat16()
    w, offsets = torch.ones(2, 1, 16, dtype=torch.bfloat16), torch.tensor([0, 1, 2])
    (tree,) = same("grouped_linear", (x, w, offsets, 8), [torch.empty(2, 1, dtype=torch.bfloat16)])
    (chain,) = same("grouped_linear", (x, w, offsets, 1), [torch.empty(2, 1, dtype=torch.bfloat16)])
    assert tree.tolist() == [[6.0], [6.0]]
    assert chain.tolist() == [[4.0], [4.0]]


def test_a_tile_stores_its_own_experts_rows_only(monkeypatch):
    """On a GPU tiles finish in any order; here the first runs alone."""
    kernel = grouped_linear.grouped_kernel

    class First:
        def __getitem__(self, grid):
            return kernel[(1,)]

    monkeypatch.setattr(grouped_linear, "grouped_kernel", First())
    x, w, y = hashed(24, 16, seed=1), hashed(3, 8, 16, seed=2), torch.full((24, 8), NAN).bfloat16()
    grouped_linear.grouped_linear(x, w, torch.tensor([0, 5, 9, 24]), 1, y)
    assert y[:5].isfinite().all()
    assert y[5:].isnan().all()


@pytest.mark.parametrize("offsets", [[0, 3, 2, 6], [1, 2, 3, 6], [0, 2, 4, 7]])
def test_grouped_linear_refuses_wrong_offsets(offsets):
    x, w, dy = hashed(6, 8, seed=1), hashed(3, 4, 8, seed=2), hashed(6, 4, seed=3)
    offsets = torch.tensor(offsets)
    for run in (
        lambda: grouped_linear.grouped_linear(x, w, offsets, 1, dy),
        lambda: grouped_linear.grouped_linear_dx(dy, w, offsets, x),
        lambda: grouped_linear.grouped_linear_dw(dy, x, offsets, w.float()),
    ):
        with pytest.raises(RuntimeError, match="zerokl::grouped_linear: offsets must run from 0 to 6 and never fall"):
            run()
    with pytest.raises(ValueError, match="segments=16; supported on CUDA: 1 to 8"):
        grouped_linear.grouped_linear(x, w, torch.tensor([0, 2, 4, 6]), 16, dy)


def test_grouped_linear_beside_nan_rows():
    """R0: rows of the same expert and of others."""
    x, w, offsets = hashed(40, 48, seed=1), hashed(3, 20, 48, seed=2), torch.tensor([0, 18, 18, 40])
    bad = x.clone()
    bad[3], bad[17], bad[20] = NAN, float("inf"), NAN
    clean, dirty = (torch.empty(40, 20, dtype=torch.bfloat16) for _ in range(2))
    grouped_linear.grouped_linear(x, w, offsets, 1, clean)
    grouped_linear.grouped_linear(bad, w, offsets, 1, dirty)
    others = [i for i in range(40) if i not in (3, 17, 20)]
    assert_same_bits(dirty[others], clean[others], "row beside NaN")
    assert not dirty[[3, 17, 20]].isfinite().any()


class NeverReadOnTheHost(TorchDispatchMode):
    """Fails where the host asks a tensor for a value: on a GPU that waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host read a value"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kernel", ["grouped_kernel", "grouped_dw_kernel"])
def test_the_grid_does_not_depend_on_offsets(monkeypatch, kernel):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(grouped_linear, kernel, Recorder())
    x, w, y = hashed(40, 48, seed=1), hashed(5, 20, 48, seed=2), hashed(40, 20, seed=3)
    for counts in ([0, 0, 40, 0, 0], [8, 8, 8, 8, 8], [1, 1, 1, 1, 36]):
        offsets = torch.tensor(np.cumsum([0, *counts]))
        with NeverReadOnTheHost():
            if kernel == "grouped_kernel":
                grouped_linear.grouped_linear(x, w, offsets, 1, y)
            else:
                grouped_linear.grouped_linear_dw(y, x, offsets, torch.empty(5, 20, 48))
    assert len(grids) == 3
    assert len(set(grids)) == 1
