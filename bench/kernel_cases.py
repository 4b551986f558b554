"""The cases of the GPU regression: every op on fixed data, what it must equal, what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from zerokl import kernels

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op on data from an integer hash.

    ``run`` maps inputs to outputs; ``cross_device``: the contract gives the same bits on CPU and GPU, otherwise the
    outputs are close. ``rows``: the first input's rows are independent (R0). ``cuda_part``: on a GPU it needs the
    extension's CUDA part. ``torch_run``: what a user would call.
    """

    name: str
    inputs: Callable[[], Tensors]
    run: Callable[..., Tensors]
    cross_device: bool
    rows: bool = False
    torch_run: Callable[..., object] | None = None
    gigabytes: float = 0.0
    teraflops: float = 0.0
    cuda_part: bool = False


def hashed(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """bf16 in (-scale, scale) from an integer hash: the same bytes on every machine."""
    n = torch.Size(shape).numel()
    i = torch.arange(n, dtype=torch.int64) + (seed << 32)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        i = (i ^ (i >> shift)) * factor
    unit = ((i >> 31) & 0xFFFFFF).float() / 2.0**23 - 1.0
    return (unit * scale).reshape(shape).bfloat16()


def _linear_inputs(rows: int, inner: int, width: int) -> Tensors:
    return hashed(rows, width, seed=10), hashed(inner, width, seed=3)


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _routed(tokens: int, experts: int, k: int) -> torch.Tensor:
    """Expert indices [tokens, k]."""
    logits = hashed(tokens, experts, seed=20, scale=4).float()
    return kernels.router_topk(logits, k, scoring="softmax").indices


def _round_robin(tokens: int, experts: int, k: int) -> torch.Tensor:
    """Expert indices [tokens, k] that name as many experts as there are slots."""
    return torch.arange(tokens * k).reshape(tokens, k) % experts


def _grouped_inputs(indices: torch.Tensor, experts: int, width: int, inner: int) -> Tensors:
    rows, permutation = kernels.moe_permute(hashed(len(indices), width, seed=21), indices, experts)
    return rows, hashed(experts, inner, width, seed=22), permutation.offsets


def _combine_inputs(tokens: int, experts: int, k: int, width: int) -> Tensors:
    _, permutation = kernels.moe_permute(hashed(tokens, 1, seed=0), _routed(tokens, experts, k), experts)
    return hashed(tokens * k, width, seed=23), hashed(tokens, k, seed=24).float(), *permutation


def _moe_cases(small: bool) -> list[Case]:
    """The layers of Qwen3-30B-A3B: 128 experts, 8 a token, gate and up projection in one."""
    experts, k, width, inner = (16, 4, 128, 96) if small else (128, 8, 2048, 2 * 768)
    few, many = (3, 64) if small else (16, 4096)
    made = [
        Case(
            "router_topk", lambda: (hashed(many, experts, seed=20, scale=4),),
            lambda z: tuple(kernels.router_topk(z.float(), k, scoring="softmax")), True, True,
            lambda z: torch.topk(torch.softmax(z.float(), -1), k), gigabytes=many * (4 * experts + 12 * k) * 1e-9,
        ),
        Case(
            "router_topk groups", lambda: (hashed(many, experts, seed=20, scale=4), hashed(experts, seed=25).float()),
            lambda z, b: tuple(
                kernels.router_topk(z.float(), k, scoring="sigmoid", bias=b, groups=kernels.Groups(8, 4), scale=2.5)
            ), True, True, gigabytes=many * (4 * experts + 12 * k) * 1e-9,
        ),
        Case(
            "moe_permute", lambda: (hashed(many, width, seed=21), _routed(many, experts, k)),
            lambda x, i: (kernels.moe_permute(x, i, experts)[0],), True,
            torch_run=lambda x, i: x[i.flatten().argsort(stable=True) // k], gigabytes=2e-9 * many * (k + 1) * width,
        ),
        Case(
            "moe_combine", partial(_combine_inputs, many, experts, k, width),
            lambda y, w, *permutation: (kernels.moe_combine(y, kernels.Permutation(*permutation), w),), True,
            torch_run=lambda y, w, *permutation: (y[permutation[2]] * w[..., None]).sum(1),
            gigabytes=2e-9 * many * (k + 1) * width,
        ),
        Case(
            "silu_and_mul row_weight", lambda: (hashed(many * k, inner, seed=26), hashed(many * k, seed=27).float()),
            lambda x, w: (kernels.silu_and_mul(x, row_weight=w),), True, gigabytes=3e-9 * many * k * inner,
        ),
    ]  # fmt: skip
    for tokens, route in ((few, _round_robin), (many, _routed)):
        inputs = partial(_grouped_inputs, route(tokens, experts, k), experts, width, inner)
        made.append(
            Case(
                f"grouped_linear T={tokens}", inputs,
                lambda x, w, o: (kernels.grouped_linear(x, w, o),), False,
                torch_run=lambda x, w, o: functional.grouped_mm(x, w.transpose(1, 2), offs=o[1:].int()),
                gigabytes=2e-9 * min(experts, tokens * k) * inner * width, teraflops=2e-12 * tokens * k * inner * width,
            )
        )  # fmt: skip
    return made


def _quantiser_cases(small: bool) -> list[Case]:
    """Activations, and weights of several sizes in one launch."""
    tokens, width, inner = (96, 256, 512) if small else (4096, 4096, 12288)
    x, shapes = partial(hashed, tokens, width, seed=1), ((inner, width), (width, inner), (width, width))
    formats: dict[str, tuple[Callable[..., Any], float]] = {
        "fp8_block": (partial(kernels.quantize_fp8_block, block=(1, 128)), 1 + 4 / 128),
        "mxfp8": (kernels.quantize_mxfp8, 1 + 1 / 32),
        "int4_group": (partial(kernels.quantize_int4_group, group=32), 1 / 2 + 2 / 32),
    }
    weights = {**formats, "fp8_block": (partial(kernels.quantize_fp8_block, block=(128, 128)), 1.0)}
    fakes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fp8_block": partial(kernels.fake_quantize_fp8_block, block=(1, 128)),
        "mxfp8": kernels.fake_quantize_mxfp8,
        "int4_group": partial(kernels.fake_quantize_int4_group, group=32),
    }
    made = []
    for name, (one, size) in formats.items():
        (many, many_size), fake = weights[name], fakes[name]
        elements = sum(n * k for n, k in shapes)
        made += [
            Case(
                f"quantize_{name}", lambda: (x(),), lambda x, one=one: tuple(one(x)[:2]), True, True,
                gigabytes=1e-9 * tokens * width * (2 + size),
            ),
            Case(
                f"quantize_{name} weights",
                lambda: tuple(hashed(n, k, seed=20 + i) for i, (n, k) in enumerate(shapes)),
                lambda *w, many=many: tuple(t for q in many(w) for t in q[:2]), True,
                gigabytes=1e-9 * elements * (2 + many_size),
            ),
            Case(
                f"fake_quantize_{name}", lambda: (x(),), lambda x, fake=fake: (fake(x),), True, True,
                gigabytes=1e-9 * tokens * width * (4 + 2 * size),
            ),
        ]  # fmt: skip
    return made


def _quantised_linear_cases(small: bool) -> list[Case]:
    """Linear layers on codes; the weight is quantised beforehand."""
    width, inner = (256, 512) if small else (4096, 12288)
    w, bias = partial(hashed, inner, width, seed=3), partial(hashed, inner, seed=14)
    kinds: dict[str, tuple[Callable[[], Any], Callable[..., Any], float]] = {
        "fp8_linear": (
            lambda: kernels.quantize_fp8_block(w(), block=(128, 128))[:2],
            lambda x, c, s, b: kernels.fp8_linear(x, kernels.Fp8Block(c, s, (128, 128)), b),
            1.0,
        ),
        "mxfp8_linear": (
            lambda: kernels.quantize_mxfp8(w()),
            lambda x, c, s, b: kernels.mxfp8_linear(x, kernels.Mxfp8(c, s), b),
            1 + 1 / 32,
        ),
        "int4_linear": (
            lambda: kernels.quantize_int4_group(w(), group=32),
            lambda x, c, s, b: kernels.int4_linear(x, kernels.Int4Group(c, s), b),
            1 / 2 + 2 / 32,
        ),
    }
    made = []
    for name, (codes, run, size) in kinds.items():
        for rows in (1, 70) if small else (1, 16, 256, 4096):

            def inputs(rows: int = rows, codes: Callable[[], Any] = codes) -> Tensors:
                return (hashed(rows, width, seed=10), *codes(), bias())

            made.append(
                Case(
                    f"{name} M={rows}", inputs, lambda *inputs, run=run: (run(*inputs),), False, True,
                    gigabytes=1e-9 * inner * width * size, teraflops=2e-12 * rows * inner * width,
                )
            )  # fmt: skip
    return made


def cases(small: bool) -> list[Case]:
    """Every case; ``small`` sizes for a rehearsal on a CPU."""
    tokens, width, inner, vocab = (96, 256, 512, 1000) if small else (4096, 4096, 12288, 128256)
    heads, kv_heads, dim, length = (4, 2, 64, 96) if small else (32, 8, 128, 4096)
    hidden, up = partial(hashed, tokens, width, seed=1), partial(hashed, tokens, 2 * inner, seed=2)
    norm = partial(hashed, width, seed=4)
    head, positions = partial(hashed, vocab, width, seed=5), torch.arange(tokens)
    bytes_of = 2e-9
    made = [
        Case(
            "rms_norm", lambda: (hidden(), norm()), lambda x, w: (kernels.rms_norm(x, w, 1e-5),), True, True,
            lambda x, w: functional.rms_norm(x, (width,), w, 1e-5), gigabytes=2 * tokens * width * bytes_of,
        ),
        Case(
            "rms_norm residual", lambda: (hidden(), norm(), hashed(tokens, width, seed=6)),
            lambda x, w, r: tuple(kernels.rms_norm(x, w, 1e-5, residual=r)), True,
            gigabytes=4 * tokens * width * bytes_of,
        ),
        Case(
            "silu_and_mul", lambda: (up(),), lambda x: (kernels.silu_and_mul(x),), True, True,
            lambda x: functional.silu(x[:, :inner]) * x[:, inner:], gigabytes=3 * tokens * inner * bytes_of,
        ),
        Case(
            "rotary",
            lambda: (hashed(tokens, heads, dim, seed=7), positions, kernels.rotary_table(tokens, dim, 1e4)),
            lambda q, p, t: kernels.rotary(q, q, p, t)[:1], True, gigabytes=2 * tokens * heads * dim * bytes_of,
        ),
        Case(
            "embedding", lambda: (positions % vocab, head()), lambda i, w: (kernels.embedding(i, w),), True,
            torch_run=functional.embedding, gigabytes=2 * tokens * width * bytes_of,
        ),
        Case(
            "logprob_from_logits", lambda: (hashed(64, vocab, seed=8, scale=8).float(), torch.arange(64)),
            lambda z, t: (kernels.logprob_from_logits(z, t, temperature=0.7),), True, False,
            lambda z, t: torch.log_softmax(z, -1).gather(1, t[:, None]), gigabytes=64 * vocab * 4e-9,
        ),
        Case(
            "sample", lambda: (hashed(64, vocab, seed=9, scale=8).float(), torch.arange(64), torch.arange(64)),
            lambda z, s, p: kernels.sample(z, seed=s, position=p, temperature=0.9, top_p=0.95), True,
        ),
        Case(
            "selected_logprob", lambda: (hidden(), head(), positions % vocab),
            lambda x, w, t: (kernels.selected_logprob(x, w, t).logprob,), False,
            torch_run=lambda x, w, t: torch.log_softmax((x @ w.T).float(), -1).gather(1, t[:, None]),
            teraflops=2e-12 * tokens * width * vocab,
        ),
    ]  # fmt: skip
    for rows in (1, 8, 64) if small else (1, 16, 64, 256, 4096):
        made.append(
            Case(
                f"linear M={rows}", partial(_linear_inputs, rows, inner, width),
                lambda x, w: (kernels.linear(x, w),), False, True, lambda x, w: x @ w.T,
                gigabytes=inner * width * bytes_of, teraflops=2e-12 * rows * inner * width,
            )
        )  # fmt: skip
    cu = torch.tensor([0, length], dtype=torch.int32)
    shapes = ((length, heads, dim, 11), (length, kv_heads, dim, 12), (length, kv_heads, dim, 13))
    made.append(
        Case(
            "attention_varlen causal",
            lambda: (*(hashed(t, h, d, seed=s) for t, h, d, s in shapes), cu),
            lambda q, k, v, cu: (kernels.attention_varlen(q, k, v, cu, scale=dim**-0.5),), False, False,
            _torch_attention,
            teraflops=2e-12 * length * length * heads * dim,
        )
    )  # fmt: skip
    return made + _moe_cases(small) + _quantiser_cases(small) + _quantised_linear_cases(small)
