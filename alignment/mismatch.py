"""How far two policies are apart on the tokens one of them sampled: the k1, k2 and k3 estimators of KL.

With log-probabilities `p` of the sampling policy (the rollout) and `q` of the other (the trainer) and `r = exp(q - p)`:

    k1 = -(q - p)          unbiased for KL(p || q), high variance, may be negative
    k2 = (q - p)^2 / 2     biased, low variance
    k3 = (r - 1) - (q - p) unbiased, low variance, never negative

(J. Schulman, "Approximating KL Divergence", 2020.) Equal bits give exactly 0.0 for all three.

`measure` (and `gap`, of what an engine sampled) says more about two policies that are not equal on purpose: ratios,
perplexities, effective sample size, and the tokens they disagree on most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from zerokl.alignment.ratios import at_level, check_pair, effective_sample_size, sequence_lengths
from zerokl.alignment.types import Generation


@dataclass(frozen=True)
class Kl:
    """Means over tokens, in double precision; NaN where any input is not finite (or there is none)."""

    k1: float
    k2: float
    k3: float


def kl_estimates(rollout: np.ndarray, trainer: np.ndarray) -> Kl:
    """KL estimates from fp32 [n] log-probabilities of the same sampled tokens. Raises ValueError for unequal shapes."""
    if rollout.shape != trainer.shape or rollout.ndim != 1:
        raise ValueError(f"kl_estimates needs two equal 1-D arrays, got {rollout.shape} and {trainer.shape}")
    if rollout.size == 0 or not (np.isfinite(rollout).all() and np.isfinite(trainer).all()):
        return Kl(float("nan"), float("nan"), float("nan"))
    d = trainer.astype(np.float64) - rollout.astype(np.float64)
    # `+ 0.0` turns -0.0 into 0.0: an exact zero prints as one
    return Kl(float((-d).mean() + 0.0), float((d * d / 2).mean()), float((np.expm1(d) - d).mean()))


@dataclass(frozen=True)
class ExtremeToken:
    """A token the policies are far apart on: which sample, which of its tokens, its id, both log-probabilities."""

    sample: int
    position: int
    token: int
    rollout: float
    trainer: float


@dataclass(frozen=True)
class PolicyGap:
    """How far the trainer is from the rollout. Every float but those in `extremes` is NaN where `nonfinite` is not 0.

    nonfinite: tokens with a NaN or infinite log-probability on either side. ratio_*: the tokens' trainer / rollout;
    its mean is near 1 where the rollout covers the trainer. sequence_log_ratio_*: of whole responses, whose ratios may
    exceed every float. perplexity_*: exp of minus the mean log-probability of a token; the gap is trainer - rollout.
    ess_*: effective sample size over tokens and over responses, as a share. extremes: not finite first, then by
    |difference|, ties in order.
    """

    tokens: int
    sequences: int
    nonfinite: int
    kl: Kl
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    sequence_log_ratio_min: float
    sequence_log_ratio_max: float
    perplexity_rollout: float
    perplexity_trainer: float
    perplexity_gap: float
    ess_tokens: float
    ess_sequences: float
    extremes: tuple[ExtremeToken, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: NaN and infinities become null."""
        return _plain(asdict(self))


def measure(
    rollout: torch.Tensor,
    trainer: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens: Sequence[int] | torch.Tensor,
    *,
    extremes: int = 10,
) -> PolicyGap:
    """Compare fp32 [n] log-probabilities of the same sampled `tokens` (ids, [n]).

    cu_seqlens: int32 or int64 [B + 1], where the responses start among the n tokens; `extremes`: how many to name.
    Raises ValueError for shapes, dtypes, empty sequences or a negative number; NaN and Inf are counted, never hidden.
    """
    check_pair(rollout, trainer)
    lengths = sequence_lengths(cu_seqlens, rollout.numel())
    if len(tokens) != rollout.numel() or extremes < 0:
        raise ValueError(f"measure needs {rollout.numel()} token ids and extremes >= 0, got {len(tokens)}, {extremes}")
    p, q = rollout.detach().double(), trainer.detach().double()
    finite = torch.isfinite(p) & torch.isfinite(q)
    named = _extremes(p, q, finite, cu_seqlens, tokens, extremes)
    if not bool(finite.all()):
        p = q = torch.full_like(p, math.nan)  # a mean over the rest would hide it
    d = q - p
    ratio, sequences = d.exp(), at_level(d, lengths, "sequence")
    perplexity_rollout, perplexity_trainer = (float(torch.exp(-x.mean())) for x in (p, q))
    return PolicyGap(
        tokens=d.numel(),
        sequences=lengths.numel(),
        nonfinite=int((~finite).sum()),
        kl=kl_estimates(rollout.detach().cpu().numpy(), trainer.detach().cpu().numpy()),
        ratio_mean=float(ratio.mean()),
        ratio_min=float(ratio.min()),
        ratio_max=float(ratio.max()),
        sequence_log_ratio_min=float(sequences.min()),
        sequence_log_ratio_max=float(sequences.max()),
        perplexity_rollout=perplexity_rollout,
        perplexity_trainer=perplexity_trainer,
        perplexity_gap=perplexity_trainer - perplexity_rollout,
        ess_tokens=effective_sample_size(d),
        ess_sequences=effective_sample_size(sequences),
        extremes=named,
    )


def gap(generations: Sequence[Generation], trainer: Sequence[np.ndarray], *, extremes: int = 10) -> PolicyGap:
    """`measure` of generations' log-probabilities as decoded against the trainer's fp32 [n] of the same tokens.

    Generations without a token are left out of it, but keep their number in ``extremes``. Raises ValueError as
    `measure` does, and where the counts differ.
    """
    counts = [len(generation.output_ids) for generation in generations]
    if counts != [len(values) for values in trainer]:
        raise ValueError(
            f"gap needs a log-probability for each of the tokens {counts}, got {[len(v) for v in trainer]}"
        )
    held = [index for index, count in enumerate(counts) if count]
    if not held:
        raise ValueError("gap needs at least one sampled token")
    found = measure(
        torch.from_numpy(np.concatenate([generations[i].logprobs for i in held])),
        torch.from_numpy(np.concatenate([trainer[i] for i in held])),
        torch.from_numpy(np.cumsum([0, *(counts[i] for i in held)])),
        [token for i in held for token in generations[i].output_ids],
        extremes=extremes,
    )
    return replace(found, extremes=tuple(replace(token, sample=held[token.sample]) for token in found.extremes))


def _extremes(
    p: torch.Tensor,
    q: torch.Tensor,
    finite: torch.Tensor,
    cu_seqlens: torch.Tensor,
    tokens: Sequence[int] | torch.Tensor,
    count: int,
) -> tuple[ExtremeToken, ...]:
    distance = torch.where(finite, (q - p).abs(), math.inf)
    worst = distance.argsort(descending=True, stable=True)[:count]
    # the last start at or before the token
    samples = torch.searchsorted(cu_seqlens.to(torch.int64), worst, right=True) - 1
    return tuple(
        ExtremeToken(sample, at - int(cu_seqlens[sample]), int(tokens[at]), float(p[at]), float(q[at]))
        for at, sample in zip(worst.tolist(), samples.tolist(), strict=True)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
