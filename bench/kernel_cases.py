"""The cases of the GPU regression: every op on fixed data, what it must equal, what it is timed against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from zerokl import kernels

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op on data from an integer hash.

    ``run`` maps inputs to outputs; ``cross_device``: the contract gives the same bits on CPU and GPU, otherwise the
    outputs are close. ``rows``: the first input's rows are independent (R0). ``torch_run``: what a user would call.
    """

    name: str
    inputs: Callable[[], Tensors]
    run: Callable[..., Tensors]
    cross_device: bool
    rows: bool = False
    torch_run: Callable[..., object] | None = None
    gigabytes: float = 0.0
    teraflops: float = 0.0


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


def _decode_inputs(batch: int, length: int, heads: int, kv_heads: int, dim: int) -> Tensors:
    """One query for each of ``batch`` sequences of ``length`` keys, on pages of 16 that lie in order."""
    table = torch.arange(batch * length // 16, dtype=torch.int32).reshape(batch, -1)
    caches = (hashed(table.numel(), 16, kv_heads, dim, seed=s) for s in (15, 16))
    lens = torch.full((batch,), length, dtype=torch.int32)
    return hashed(batch, heads, dim, seed=14, scale=4), *caches, table, lens, torch.ones_like(lens)


def _decode(*inputs: torch.Tensor) -> Tensors:
    return (kernels.attention_paged(*inputs, scale=inputs[0].shape[2] ** -0.5),)


def _torch_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, *_: torch.Tensor) -> object:
    k, v = (t.reshape(len(table), -1, *t.shape[2:]).transpose(1, 2) for t in (k, v))
    return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)


def _decode_against_prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Where the bits of the last 16 positions differ between one-token decoding and prefill: nowhere."""
    length, scale = len(q), q.shape[2] ** -0.5
    cu, table = q.new_tensor([0, length], dtype=torch.int32), torch.arange(length, dtype=torch.int32, device=q.device)
    whole = kernels.attention_varlen(q, k, v, cu, scale=scale)[-16:]
    lens, one = q.new_tensor([length - 15], dtype=torch.int32) + table[:16, None], table[1:2]
    caches = k[:, None], v[:, None]
    alone = [kernels.attention_paged(q[n - 1 :][:1], *caches, table[None], n, one, scale=scale) for n in lens]
    return (torch.cat(alone).view(torch.int16) ^ whole.view(torch.int16),)


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
            "rotary interleaved",
            lambda: (hashed(tokens, heads, dim, seed=7), positions, kernels.rotary_table(tokens, dim // 2, 1e4)),
            lambda q, p, t: kernels.rotary(q, q, p, t, interleaved=True)[:1], True,
            gigabytes=2 * tokens * heads * dim * bytes_of,
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
    unequal = ((length, heads, 192, 20), (length, kv_heads, 192, 21), (length, kv_heads, 128, 22))
    made.append(
        Case(
            "attention_varlen sinks",
            lambda: (*(hashed(t, h, d, seed=s) for t, h, d, s in unequal), cu, hashed(heads, seed=23)),
            lambda q, k, v, cu, sinks: (
                kernels.attention_varlen(q, k, v, cu, scale=192**-0.5, window=length // 2, sinks=sinks),
            ),
            False,
            teraflops=2e-12 * length * length * heads * 160 * 0.75,
        )
    )
    for batch, context in ((1, 2064), (3, 1040)) if small else ((1, 131072), (32, 4096)):
        made.append(
            Case(
                f"attention_paged decode B={batch}", partial(_decode_inputs, batch, context, heads, kv_heads, dim),
                _decode, False, False, _torch_decode, gigabytes=2 * batch * context * kv_heads * dim * bytes_of,
            )
        )  # fmt: skip
    long = 1100 if small else 5000
    made.append(
        Case(
            "decode xor prefill",
            lambda: tuple(hashed(long, h, dim, seed=s) for h, s in ((heads, 17), (kv_heads, 18), (kv_heads, 19))),
            _decode_against_prefill, True,
        )
    )  # fmt: skip
    return made
