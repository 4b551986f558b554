"""torch.compile traces the ops without a graph break and changes no bit."""

import pytest
import torch
from data import assert_same_bits, hashed

from zerokl import kernels

WIDTH, HEADS, DIM, EXPERTS = 64, 2, 32, 6


def block(x, w, positions, cu, table):
    """A layer of a model with experts, and its log-probabilities, from the public ops."""
    h = kernels.rms_norm(x, w["norm"], 1e-5)
    q, k, v = kernels.linear(h, w["qkv"]).view(-1, 3 * HEADS, DIM).split(HEADS, 1)
    q, k = kernels.rotary(q, k, positions, table)
    a = kernels.attention_varlen(q, k, v, cu, scale=0.2, window=7, sinks=w["sinks"])
    h, s = kernels.rms_norm(kernels.linear(a.flatten(1), w["out"]), w["norm"], 1e-5, residual=x)
    routing = kernels.router_topk(kernels.linear(h, w["router"], out_dtype=torch.float32), 2, scoring="softmax")
    rows, permutation = kernels.moe_permute(h, routing.indices, EXPERTS)
    inner = kernels.silu_and_mul(kernels.grouped_linear(rows, w["up"], permutation.offsets))
    y = kernels.grouped_linear(inner, w["down"], permutation.offsets)
    y = kernels.moe_combine(y, permutation, routing.weights, shared=s)
    return kernels.selected_logprob(y, w["head"], positions, temperature=0.7).logprob


def test_no_graph_break_and_equal_bits():
    shapes = {
        "norm": (WIDTH,), "qkv": (3 * HEADS * DIM, WIDTH), "sinks": (HEADS,), "out": (WIDTH, HEADS * DIM),
        "router": (EXPERTS, WIDTH), "up": (EXPERTS, 2 * WIDTH, WIDTH), "down": (EXPERTS, WIDTH, WIDTH),
        "head": (90, WIDTH),
    }  # fmt: skip
    w = {name: hashed(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}
    x = hashed(12, WIDTH, seed=99).requires_grad_()
    inputs = (torch.arange(12), torch.tensor([0, 5, 12], dtype=torch.int32), kernels.rotary_table(12, DIM, 1e4))
    leaves = [x, *w.values()]
    expected = block(x, w, *inputs)
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = compiled(x, w, *inputs)
    assert_same_bits(got, expected, "log-probabilities")
    for name, a, b in zip(("x", *w), torch.autograd.grad(got.sum(), leaves), expected_grads, strict=True):
        assert_same_bits(a, b, f"gradient of {name}")


def test_every_op_has_a_fake():
    from zerokl.kernels.ops._common import ops

    for name in vars(ops):
        if name != "set_isa":
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zerokl::{name}", "Meta"), name


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
