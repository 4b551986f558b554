"""Dense layers, embedding, log-probabilities and sampling."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from zerokl import kernels
from zerokl.bench.regression.case import Case, Tensors, hashed


def _linear_inputs(rows: int, inner: int, width: int) -> Tensors:
    return hashed(rows, width, seed=10), hashed(inner, width, seed=3)


def dense_cases(small: bool) -> list[Case]:
    """The ops of a dense layer, the output head and the sampler."""
    tokens, width, inner, vocab = (96, 256, 512, 1000) if small else (4096, 4096, 12288, 128256)
    heads, dim = (4, 64) if small else (32, 128)
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
    return made
