"""What the speed suite times: each op, and beside it what a user would otherwise call (torch, eager)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from zerokl import kernels

Call = Callable[[], object]
CACHE_BYTES = 1 << 28
"""More than any cache holds, of a CPU or a GPU."""


@dataclass(frozen=True)
class Speed:
    """One op at one shape. ``bytes`` are those it must move, ``flops`` those of its products; ``goal``: x torch."""

    op: str
    shape: str
    ours: Call
    torch: Call
    bytes: float = 0.0
    flops: float = 0.0
    goal: float | None = None


def draw(*shape: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * scale).bfloat16()


def cases(device: torch.device) -> list[Speed]:
    """Shapes of a 135M model on a CPU, of an 8B model on a GPU."""
    gpu = device.type == "cuda"
    width, inner, heads, kv_heads, dim, vocab = (
        (4096, 12288, 32, 8, 128, 151936) if gpu else (576, 1536, 9, 3, 64, 49152)
    )
    rows = (32, 8192) if gpu else (32, 1024)
    weights, batches = ((2 * inner, width), (width, inner)), (1, 4, 256, 4096 if gpu else 1024)
    return [
        *(linear(device, m, n, k) for n, k in weights for m in batches),
        *(case for m in rows for case in row_ops(device, m, width, inner, heads, dim)),
        *attentions(device, heads, kv_heads, dim, 8192 if gpu else 1024, (64, 4096) if gpu else (32, 512)),
        *scores(device, width, vocab, (64, 4096) if gpu else (32, 256)),
        *experts(device, 2048 if gpu else 256, 2048 if gpu else 512, 768 if gpu else 256),
        *(case for m in rows for case in quantisers(device, m, inner)),
        *(case for m in (1, batches[-1]) for case in quantised_linears(device, m, 2 * inner, width)),
    ]


def linear(device: torch.device, m: int, n: int, k: int) -> Speed:
    """Up to 4 rows every call takes another copy of the weight: as in a model, no cache holds it by then."""
    x, w = draw(m, k, device=device), draw(n, k, device=device)
    copies = [w.clone() for _ in range(max(1, CACHE_BYTES // (2 * n * k)))] if m <= 4 else [w]
    at_fp32 = device.type == "cpu" and m >= 256  # a CPU's goal there is torch's fp32 rate
    left, rights = (x.float(), [w.float()]) if at_fp32 else (x, copies)
    mine, theirs = itertools.cycle(copies), itertools.cycle(rights)
    note = " cold" if m <= 4 else " fp32" if at_fp32 else ""
    return Speed(
        "linear", f"{m}x{n}x{k}{note}", lambda: kernels.linear(x, next(mine)), lambda: left @ next(theirs).T,
        2.0 * n * k, 2.0 * m * n * k, 0.9,
    )  # fmt: skip


def row_ops(device: torch.device, m: int, width: int, inner: int, heads: int, dim: int) -> list[Speed]:
    x, r, w = draw(m, width, device=device), draw(m, width, device=device), draw(width, device=device)
    up, q = draw(m, 2 * inner, device=device), draw(m, heads, dim, device=device)
    positions, table = torch.arange(m, device=device), kernels.rotary_table(m, dim, 1e4).to(device)
    return [
        Speed("rms_norm", f"{m}x{width}", lambda: kernels.rms_norm(x, w, 1e-6),
              lambda: functional.rms_norm(x, (width,), w, 1e-6), 4.0 * m * width, goal=2),
        Speed("rms_norm residual", f"{m}x{width}", lambda: kernels.rms_norm(x, w, 1e-6, residual=r),
              lambda: functional.rms_norm(x + r, (width,), w, 1e-6), 8.0 * m * width, goal=2),
        Speed("silu_and_mul", f"{m}x{inner}", lambda: kernels.silu_and_mul(up),
              lambda: functional.silu(up[:, :inner]) * up[:, inner:], 6.0 * m * inner, goal=2),
        Speed("rotary", f"{m}x{heads}x{dim}", lambda: kernels.rotary(q, q, positions, table),
              lambda: (_rotate(q, positions, table), _rotate(q, positions, table)), 8.0 * m * heads * dim),
    ]  # fmt: skip


def _rotate(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    (cos, sin), (a, b) = table[positions][:, None].chunk(2, -1), x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).bfloat16()


def attentions(
    device: torch.device, heads: int, kv_heads: int, dim: int, length: int, decode: tuple[int, int]
) -> list[Speed]:
    q, k, v = (draw(length, h, dim, device=device) for h in (heads, kv_heads, kv_heads))
    cu = torch.tensor([0, length], dtype=torch.int32, device=device)
    bq, bk, bv = (t.transpose(0, 1)[None] for t in (q, k, v))
    leaves = gq, gk, gv = [t.clone().requires_grad_() for t in (q, k, v)]
    torch_leaves = tq, tk, tv = [t.clone().requires_grad_() for t in (bq, bk, bv)]
    dout = draw(length, heads, dim, device=device)
    scale, flops = dim**-0.5, 2.0 * length * length * heads * dim

    def ours_backward() -> object:
        out = kernels.attention_varlen(gq, gk, gv, cu, scale=scale)
        return torch.autograd.grad(out, leaves, dout)

    def torch_backward() -> object:
        out = functional.scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, torch_leaves, dout.transpose(0, 1)[None])

    def eager_backward() -> object:
        return torch.autograd.grad(_eager_attention(tq, tk, tv, scale), torch_leaves, dout.transpose(0, 1)[None])

    batch, keys = decode
    page, pages = 64, keys // 64
    k_cache, v_cache = (draw(batch * pages, page, kv_heads, dim, device=device) for _ in range(2))
    table = torch.randperm(batch * pages, device=device).int().reshape(batch, pages)
    lens = torch.full((batch,), keys, dtype=torch.int32, device=device)
    one, query = torch.ones_like(lens), draw(batch, heads, dim, device=device)
    dk, dv = (t.reshape(batch, keys, kv_heads, dim).transpose(1, 2) for t in (k_cache, v_cache))
    return [
        Speed("attention_varlen", f"{length} {heads}/{kv_heads}x{dim}",
              lambda: kernels.attention_varlen(q, k, v, cu, scale=scale),
              lambda: functional.scaled_dot_product_attention(bq, bk, bv, is_causal=True, enable_gqa=True),
              flops=flops),
        Speed("attention_varlen / eager ops", f"{length} {heads}/{kv_heads}x{dim}",
              lambda: kernels.attention_varlen(q, k, v, cu, scale=scale), lambda: _eager_attention(bq, bk, bv, scale),
              flops=flops, goal=2),
        Speed("attention + backward", f"{length} {heads}/{kv_heads}x{dim}", ours_backward, torch_backward,
              flops=3.5 * flops),
        Speed("attention + backward / eager ops", f"{length} {heads}/{kv_heads}x{dim}", ours_backward, eager_backward,
              flops=3.5 * flops, goal=2),
        Speed("attention_paged decode", f"{batch}x{keys}",
              lambda: kernels.attention_paged(query, k_cache, v_cache, table, lens, one, scale=scale),
              lambda: functional.scaled_dot_product_attention(query[:, :, None], dk, dv, enable_gqa=True),
              4.0 * batch * keys * kv_heads * dim, goal=2),
    ]  # fmt: skip


def _eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention from torch's separate ops, softmax in fp32."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    z = ((q @ k.transpose(2, 3)).float() * scale).masked_fill(~seen, -torch.inf)
    return torch.softmax(z, -1).bfloat16() @ v


def scores(device: torch.device, width: int, vocab: int, rows: tuple[int, int]) -> list[Speed]:
    few, many = rows
    head = draw(vocab, width, device=device, scale=width**-0.5)
    hidden, targets = draw(many, width, device=device), torch.arange(many, device=device)
    logits, seed = draw(few, vocab, device=device).float(), torch.arange(few, device=device)
    return [
        Speed("embedding", f"{many}x{width}", lambda: kernels.embedding(targets, head),
              lambda: functional.embedding(targets, head), 4.0 * many * width),
        Speed("selected_logprob", f"{many}x{vocab}x{width}",
              lambda: kernels.selected_logprob(hidden, head, targets, temperature=0.8),
              lambda: torch.log_softmax((hidden @ head.T).float() / 0.8, -1).gather(1, targets[:, None]),
              flops=2.0 * many * vocab * width, goal=2),
        Speed("logprob_from_logits", f"{few}x{vocab}",
              lambda: kernels.logprob_from_logits(logits, seed, temperature=0.8),
              lambda: torch.log_softmax(logits / 0.8, -1).gather(1, seed[:, None]), 4.0 * few * vocab, goal=2),
        Speed("sample", f"{few}x{vocab}", lambda: kernels.sample(logits, seed=seed, position=seed),
              lambda: torch.multinomial(torch.softmax(logits, -1), 1), 4.0 * few * vocab),
        Speed("sample top-p", f"{few}x{vocab}",
              lambda: kernels.sample(logits, seed=seed, position=seed, temperature=0.8, top_p=0.95),
              lambda: _torch_top_p(logits, 0.8, 0.95), 4.0 * few * vocab),
    ]  # fmt: skip


def _torch_top_p(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    p, index = torch.softmax(logits / temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return index.gather(1, torch.multinomial(p, 1))


def experts(device: torch.device, tokens: int, width: int, inner: int, count: int = 64, k: int = 8) -> list[Speed]:
    logits = torch.randn(tokens, count, device=device)
    x, w = draw(tokens, width, device=device), draw(count, inner, width, device=device)
    routing = kernels.router_topk(logits, k, scoring="softmax")
    rows, permutation = kernels.moe_permute(x, routing.indices, count)
    bounds = permutation.offsets.tolist()

    def torch_router() -> object:
        weights, indices = torch.softmax(logits, -1).topk(k)
        return weights / weights.sum(-1, keepdim=True), indices

    def torch_grouped() -> object:
        return torch.cat([rows[a:b] @ w[e].T for e, (a, b) in enumerate(itertools.pairwise(bounds))])

    def torch_combine() -> object:
        gathered = rows[permutation.position.flatten()].reshape(tokens, k, width)
        return (gathered * routing.weights[..., None]).sum(1).bfloat16()

    return [
        Speed("router_topk", f"{tokens}x{count} top {k}", lambda: kernels.router_topk(logits, k, scoring="softmax"),
              torch_router, 4.0 * tokens * count),
        Speed("moe_permute", f"{tokens}x{k}x{width}", lambda: kernels.moe_permute(x, routing.indices, count),
              lambda: x[torch.argsort(routing.indices.flatten(), stable=True) // k],
              2.0 * tokens * (k + 1) * width),
        Speed("grouped_linear", f"{tokens * k}x{inner}x{width}",
              lambda: kernels.grouped_linear(rows, w, permutation.offsets), torch_grouped,
              2.0 * count * inner * width, 2.0 * tokens * k * inner * width),
        Speed("moe_combine", f"{tokens}x{k}x{width}", lambda: kernels.moe_combine(rows, permutation, routing.weights),
              torch_combine, 2.0 * tokens * (k + 1) * width),
    ]  # fmt: skip


def quantisers(device: torch.device, m: int, inner: int) -> list[Speed]:
    x = draw(m, inner, device=device)
    fp8, mx = kernels.quantize_fp8_block(x, block=(1, 128)), kernels.quantize_mxfp8(x)
    int4 = kernels.quantize_int4_group(x, group=128)
    return [
        Speed("dequantize_fp8_block", f"{m}x{inner}", lambda: kernels.dequantize_fp8_block(fp8),
              lambda: _torch_scaled(fp8.codes, fp8.scales, 128), 3.0 * m * inner),
        Speed("dequantize_mxfp8", f"{m}x{inner}", lambda: kernels.dequantize_mxfp8(mx),
              lambda: _torch_scaled(mx.codes, mx.scales, 32), 3.0 * m * inner),
        Speed("dequantize_int4_group", f"{m}x{inner}", lambda: kernels.dequantize_int4_group(int4),
              lambda: _torch_scaled(_torch_nibbles(int4.codes), int4.scales, 128), 2.5 * m * inner),
        Speed("fake_quantize_int4_group", f"{m}x{inner}", lambda: kernels.fake_quantize_int4_group(x, group=128),
              lambda: _torch_fake_int4(x), 4.0 * m * inner),
        Speed("quantize_fp8_block", f"{m}x{inner}", lambda: kernels.quantize_fp8_block(x, block=(1, 128)),
              lambda: _torch_fp8(x, 128), 3.0 * m * inner),
        Speed("quantize_mxfp8", f"{m}x{inner}", lambda: kernels.quantize_mxfp8(x), lambda: _torch_fp8(x, 32),
              3.0 * m * inner),
        Speed("quantize_int4_group", f"{m}x{inner}", lambda: kernels.quantize_int4_group(x, group=128),
              lambda: _torch_int4(x), 2.5 * m * inner),
    ]  # fmt: skip


def quantised_linears(device: torch.device, m: int, n: int, k: int) -> list[Speed]:
    """Against torch's bf16 product on the weight that was quantised: what a user has without such a kernel."""
    x, w = draw(m, k, device=device), draw(n, k, device=device)
    fp8, mx = kernels.quantize_fp8_block(w, block=(128, 128)), kernels.quantize_mxfp8(w)
    int4 = kernels.quantize_int4_group(w, group=32)
    flops, shape = 2.0 * m * n * k, f"{m}x{n}x{k}"
    return [
        Speed("fp8_linear", shape, lambda: kernels.fp8_linear(x, fp8), lambda: x @ w.T, 1.0 * n * k, flops),
        Speed("mxfp8_linear", shape, lambda: kernels.mxfp8_linear(x, mx), lambda: x @ w.T, 1.0 * n * k, flops),
        Speed("int4_linear", shape, lambda: kernels.int4_linear(x, int4), lambda: x @ w.T, 0.5 * n * k, flops),
    ]  # fmt: skip


def _torch_scaled(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    groups = codes.float().reshape(len(codes), -1, block)
    return (groups * scales.float()[..., None]).reshape(len(codes), -1).bfloat16()


def _torch_nibbles(words: torch.Tensor) -> torch.Tensor:
    shifts = 4 * torch.arange(8, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts & 15) - 8).reshape(len(words), -1)


def _torch_fake_int4(x: torch.Tensor) -> torch.Tensor:
    groups = x.float().reshape(len(x), -1, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-5)
    return ((groups / scale).round().clamp(-8, 7) * scale).reshape(len(x), -1).bfloat16()


def _torch_fp8(x: torch.Tensor, block: int) -> object:
    groups = x.float().reshape(len(x), -1, block)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    return (groups / scale).to(torch.float8_e4m3fn), scale


def _torch_int4(x: torch.Tensor) -> object:
    groups = x.float().reshape(len(x), -1, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-5)
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int32).reshape(len(x), -1, 8) + 8
    return (codes << (4 * torch.arange(8, device=x.device, dtype=torch.int32))).sum(-1), scale
