"""Group Relative Policy Optimization (Shao et al., DeepSeekMath, arXiv:2402.03300), as pure functions.

For a prompt with G responses and rewards r_1..r_G, every token of response i has the advantage

    A_i = (r_i - mean(r)) / (std(r) + 1e-6)                    (std: population, over the group)

without the division where `normalize_std` is off (Liu et al., Dr. GRPO, arXiv:2503.20783). A group whose rewards are
all equal says nothing: its advantages are exactly 0. The loss over all N tokens of the step is

    L = -1/N * sum_t min(rho_t * A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) * A_t),   rho_t = exp(logp_t - old_t)

the token mean of DAPO (Yu et al., arXiv:2503.14476), whose asymmetric clip it allows. `old` are the rollout's
log-probabilities; here they equal the trainer's bit for bit, so rho is exactly 1 in the step's forward. Where they do
not on purpose, `alignment/correction.py` gives `old` and a weight for every term of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def advantages(rewards: Sequence[Sequence[float | None]], *, normalize_std: bool = True) -> list[list[float | None]]:
    """Advantages per group and response; a dropped sample (None) stays None and does not count in its group."""
    return [_group(group, normalize_std) for group in rewards]


def _group(rewards: Sequence[float | None], normalize_std: bool) -> list[float | None]:
    known = [r for r in rewards if r is not None]
    if not known or min(known) == max(known):
        return [None if r is None else 0.0 for r in rewards]
    mean = sum(known) / len(known)
    std = (sum((r - mean) ** 2 for r in known) / len(known)) ** 0.5
    scale = 1.0 / (std + 1e-6) if normalize_std else 1.0
    return [None if r is None else (r - mean) * scale for r in rewards]


def loss(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    token_advantages: torch.Tensor,
    *,
    total_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """This micro-batch's share of the loss: fp32 scalar.

    logprobs fp32 [n] (with gradient), old fp32 [n], token_advantages fp32 [n]; `total_tokens` is N of the whole step,
    so that the shares of all micro-batches sum to L; `weights` fp32 [n] multiply the terms, after the clip.
    """
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    terms = torch.minimum(ratio * token_advantages, clipped * token_advantages)
    if weights is not None:
        terms = weights * terms
    return -terms.sum() / total_tokens
