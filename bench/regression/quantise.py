"""Quantisers and the linear layers on their codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zerokl import kernels
from zerokl.bench.regression.case import Case, Tensors, hashed


def quantiser_cases(small: bool) -> list[Case]:
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


def quantised_linear_cases(small: bool) -> list[Case]:
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
