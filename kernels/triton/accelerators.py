"""Other people's kernels for an op, used only where a byte comparison on this GPU shows that they meet the contract.

`accelerate` judges each candidate at start-up over fixed cases: whatever differs in one byte, raises or is not
installed stays off, and the verdict says why. So switching them on changes speed, never bits. Which arguments a
candidate takes may depend on static sizes, never on the number of rows (R0). The payload of a NaN is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ..contract import LOG2E as LOG2E_TEXT

Kernel = Callable[..., None]


@dataclass(frozen=True)
class Accelerator:
    """A candidate for ``op``. ``takes`` and ``run`` have the operator's arguments; ``run`` writes its outputs.

    ``cases``: argument tuples on a device; ``outputs``: which of the arguments are written.
    """

    name: str
    op: str
    package: str
    takes: Callable[..., bool]
    run: Kernel
    cases: Callable[[torch.device], Iterable[tuple[Any, ...]]]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is used, and why (not)."""

    name: str
    op: str
    on: bool
    reason: str


LOG2E = float.fromhex(LOG2E_TEXT)

_active: dict[str, Accelerator] = {}


def dispatch(op: str, kernel: Kernel) -> Kernel:
    """``kernel``, or the accelerator in use where it takes the arguments."""

    def run(*arguments: Any) -> None:
        chosen = _active.get(op)
        (chosen.run if chosen is not None and chosen.takes(*arguments) else kernel)(*arguments)

    return run


def accelerate(
    kernels: dict[str, Kernel], device: torch.device, candidates: Iterable[Accelerator]
) -> tuple[Verdict, ...]:
    """Judge every candidate on ``device`` against ``kernels`` and use those that are byte-equal."""
    verdicts = tuple(judge(candidate, kernels[candidate.op], device) for candidate in candidates)
    _active.clear()
    _active.update({c.op: c for c, v in zip(candidates, verdicts, strict=True) if v.on})
    return verdicts


def judge(candidate: Accelerator, kernel: Kernel, device: torch.device) -> Verdict:
    """Run both on every case the candidate takes; the first difference decides."""

    def verdict(on: bool, reason: str) -> Verdict:
        return Verdict(candidate.name, candidate.op, on, reason)

    if find_spec(candidate.package) is None:
        return verdict(False, f"package {candidate.package} is not installed")
    compared = 0
    for arguments in candidate.cases(device):
        if not candidate.takes(*arguments):
            continue
        theirs = tuple(torch.full_like(a, 7) if i in candidate.outputs else a for i, a in enumerate(arguments))
        kernel(*arguments)
        try:
            candidate.run(*theirs)
        except (RuntimeError, ImportError, AssertionError) as error:
            return verdict(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        for i in candidate.outputs:
            differ = int((~_equal(arguments[i], theirs[i])).sum())
            if differ:
                sizes = [tuple(a.shape) for a in arguments if isinstance(a, torch.Tensor)]
                return verdict(False, f"{differ} of {theirs[i].numel()} values differ for shapes {sizes}")
        compared += 1
    if not compared:
        return verdict(False, "no case was compared")
    return verdict(True, f"byte-equal on {compared} cases")


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    words = torch.int16 if a.element_size() == 2 else torch.int32
    return (a.view(words) == b.view(words)) | (a.isnan() & b.isnan())


def _hashed(*shape: int, seed: int, device: torch.device, exponents: int = 8) -> torch.Tensor:
    """bf16 from an integer hash, exponents over a range."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=device) + (seed << 32)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        i = (i ^ (i >> shift)) * factor
    unit = ((i >> 31) & 0xFFFFFF).float() / 2.0**23 - 1.0
    return (unit * torch.exp2((i & 15) % (exponents + 1) - exponents // 2)).reshape(shape).bfloat16()


_ROWS, _LAYERS = (1, 7, 64, 129, 300, 2048), ((512, 256), (1536, 4096), (4096, 12288))


def _linear_case(m: int, n: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """The second half of k takes back all but a trace of the first: the sum's order shows in the rounded result."""
    x, w = _hashed(m, k, seed=m, device=device), _hashed(n, k, seed=1, device=device)
    half = k // 2
    x[:, half:], w[:, half:] = -x[:, :half], w[:, :half]
    w[:, half::16] *= 1 + 2.0**-7
    return x, w, None, 1, torch.empty(m, n, dtype=torch.bfloat16, device=device)


def _linear_cases(device: torch.device) -> Iterable[tuple[Any, ...]]:
    for n, k in _LAYERS:
        for m in _ROWS:
            yield _linear_case(m, n, k, device)


def _takes_linear(_x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, segments: int, y: torch.Tensor) -> bool:
    return bias is None and segments == 1 and y.dtype == torch.bfloat16 and not (w.shape[0] % 64 or w.shape[1] % 64)


def _deep_gemm_linear(x: torch.Tensor, w: torch.Tensor, _bias: None, _segments: int, y: torch.Tensor) -> None:
    import deep_gemm

    n, k = w.shape
    deep_gemm.bf16_gemm_nt(x.view(-1, k), w, y.view(-1, n))


def _attention_cases(device: torch.device) -> Iterable[tuple[Any, ...]]:
    for lengths, heads, kv_heads, dim in (((1, 63, 64, 65), 4, 2, 64), ((1500, 7, 2100), 8, 1, 128)):
        total = sum(lengths)
        cu = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        q, k, v = (
            _hashed(total, h, dim, seed=s, device=device, exponents=2)
            for s, h in ((2, heads), (3, kv_heads), (4, kv_heads))
        )
        lse = torch.empty(total, heads, device=device)
        yield q, k, v, cu, dim**-0.5, True, 0, None, torch.empty_like(q), lse


def _takes_attention(*arguments: Any) -> bool:
    window, sinks = arguments[6], arguments[7]
    return sinks is None and window == 0


def _flash_attention(*arguments: Any) -> None:
    from flash_attn.cute.interface import flash_attn_varlen_func

    q, k, v, cu, scale, causal, _window, _sinks, out, lse = arguments
    result, their_lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, softmax_scale=scale, causal=causal, return_lse=True
    )
    out.copy_(result)
    lse.copy_(their_lse.t() * LOG2E)  # ours is a logarithm of base 2


CANDIDATES = (
    Accelerator("DeepGEMM bf16", "linear", "deep_gemm", _takes_linear, _deep_gemm_linear, _linear_cases, (4,)),
    Accelerator(
        "FlashAttention-4",
        "attention_varlen",
        "flash_attn",
        _takes_attention,
        _flash_attention,
        _attention_cases,
        (8, 9),
    ),
)
"""Every one is judged anew on each machine. FlashAttention's blocks are not R5's, so it is expected to stay off."""
