"""Ratios of two policies' probabilities on the same sampled tokens: of a token, of a sequence, and its geometric mean.

With log-probabilities `p` of the policy that sampled and `q` of another, and `d = q - p` (in double precision):

    token      r_t = exp(d_t)
    sequence   exp(sum of d_t over the sequence)          the importance ratio of the whole response
    geometric  exp(mean of d_t over the sequence)         its |y|-th root (Zheng et al., GSPO, arXiv:2507.18071)

Everything here stays in logarithms: a sequence's ratio can exceed every float. Tokens are packed end to end, fp32 [n];
`cu_seqlens`, int32 or int64 [B + 1], holds 0 and then the end of every sequence.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Level = Literal["token", "sequence", "geometric"]
LEVELS: tuple[Level, ...] = get_args(Level)


def check_pair(sampling: torch.Tensor, other: torch.Tensor) -> None:
    """Raise ValueError unless both are fp32 [n] with the same n, at least 1."""
    if sampling.shape != other.shape or sampling.ndim != 1 or sampling.numel() == 0:
        got = f"{tuple(sampling.shape)} and {tuple(other.shape)}"
        raise ValueError(f"log-probabilities must be two equal 1-D tensors that are not empty, got {got}")
    if sampling.dtype != torch.float32 or other.dtype != torch.float32:
        raise ValueError(f"log-probabilities must be float32, got {sampling.dtype} and {other.dtype}")


def sequence_lengths(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """int64 [B] lengths. Raises ValueError unless cu_seqlens runs from 0 to `tokens` without an empty sequence."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be int32 or int64 [B + 1] with B at least 1, got {got}")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if (first, last) != (0, tokens):
        raise ValueError(f"cu_seqlens must run from 0 to the {tokens} tokens, got {first} to {last}")
    lengths = cu_seqlens.to(torch.int64).diff()
    if int(lengths.min()) < 1:
        raise ValueError(f"cu_seqlens: sequence {int(lengths.argmin())} has no token; a ratio needs at least one")
    return lengths


def log_ratios(sampling: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """float64 [n], detached: `other` minus `sampling` (both fp32 [n]).

    Raises ValueError for wrong shapes or dtypes, FloatingPointError where any value is NaN or infinite.
    """
    check_pair(sampling, other)
    finite = torch.isfinite(sampling) & torch.isfinite(other)
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"{int((~finite).sum())} of {finite.numel()} tokens have a log-probability that is not finite, "
            f"the first at {at}: {float(sampling[at].detach())} against {float(other[at].detach())}"
        )
    return other.detach().double() - sampling.detach().double()


def at_level(differences: torch.Tensor, lengths: torch.Tensor, level: Level) -> torch.Tensor:
    """float64 log ratios of the level's units: [n] for tokens, else [B]. `differences` float64 [n], `lengths` [B]."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    if level == "token":
        return differences
    sums = torch.segment_reduce(differences, "sum", lengths=lengths)
    return sums if level == "sequence" else sums / lengths


def effective_sample_size(log_weights: torch.Tensor) -> float:
    """Share of samples that a weighted mean is worth, in [1/n, 1]: (sum w)^2 / (n sum w^2) (Kong, 1992).

    `log_weights`: finite float64 [n]. Equal weights give exactly 1.
    """
    w = torch.exp(log_weights - log_weights.max())  # the largest is 1: nothing overflows, and the share is the same
    return float(w.sum().square() / w.square().sum()) / w.numel()
