"""Attention: packed sequences, sinks, decoding, and decoding against prefill."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from zerokl import kernels
from zerokl.bench.regression.case import Case, Tensors, hashed


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


def attention_cases(small: bool) -> list[Case]:
    """Attention of an 8B model, and of one with sinks and values narrower than keys."""
    heads, kv_heads, dim, length = (4, 2, 64, 96) if small else (32, 8, 128, 4096)
    bytes_of = 2e-9
    cu = torch.tensor([0, length], dtype=torch.int32)
    shapes = ((length, heads, dim, 11), (length, kv_heads, dim, 12), (length, kv_heads, dim, 13))
    made = [
        Case(
            "attention_varlen causal",
            lambda: (*(hashed(t, h, d, seed=s) for t, h, d, s in shapes), cu),
            lambda q, k, v, cu: (kernels.attention_varlen(q, k, v, cu, scale=dim**-0.5),), False, False,
            _torch_attention,
            teraflops=2e-12 * length * length * heads * dim,
        )
    ]  # fmt: skip
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
