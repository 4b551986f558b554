"""Importance weights for runs whose rollout is not the trainer's policy on purpose: stale, asynchronous, low precision.

Three policies see each sampled token: the rollout (behaviour) `b`, the proximal policy `p` that updates are measured
from, and the current policy `c`. The loss is PPO's, weighted (J. Hilton et al., "Batch size-invariance for policy
optimization", arXiv:2110.00641, the decoupled objective; used for asynchronous RL by AReaL, arXiv:2505.24298):

    L = -1/N * sum_t w_t * min(rho_t * A_t, clip(rho_t) * A_t),   rho_t = c_t / old_t

`old = "proximal"`: old is p, and w corrects from b to p. `k = p / b`, per token, as product over the sequence, or as
its geometric mean (`ratios.py`; every token of a sequence then has the same k). With bounds [lower, upper]:

    truncate   w = min(max(k, lower), upper)    TIS: F. Yao et al., "Your efficient RL framework secretly brings you
                                                off-policy RL training", 2025 (token level, upper bound alone)
    mask       w = k inside the bounds, else 0  IcePop: Ling team, "Every Step Evolves", arXiv:2510.18855 (token level);
                                                the sequence levels are known as masked importance sampling

`old = "rollout"` (the bypass): old is b, there is no proximal policy, and rho = c / b is itself the importance weight,
bounded by PPO's clip. So w is 1, with `mask` 0 where c / b leaves the bounds; `truncate` has nothing left to bound.

GSPO itself clips the geometric ratio of the current policy inside the loss, with its gradient; here it is a weight.
Masked tokens still count in N, as in IcePop. Weights are constants: no gradient flows through them. Equal bits give
weights of exactly 1.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from zerokl.alignment.ratios import LEVELS, Level, at_level, effective_sample_size, log_ratios, sequence_lengths

Old = Literal["proximal", "rollout"]
Outside = Literal["truncate", "mask"]


@dataclass(frozen=True)
class Correction:
    """Which ratio is bounded, and what happens outside the bounds. `upper` None: no upper bound.

    Raises ValueError with every impossible value. Bounds must hold 1: equal policies are never corrected.
    """

    old: Old = "proximal"
    level: Level = "token"
    outside: Outside = "truncate"
    lower: float = 0.0
    upper: float | None = None

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError("; ".join(problems))

    @property
    def bounded(self) -> bool:
        return self.lower > 0 or self.upper is not None

    def _problems(self) -> list[str]:
        choices = {"old": get_args(Old), "level": LEVELS, "outside": get_args(Outside)}
        problems = [
            f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]
        if not 0 <= self.lower <= 1:
            problems.append(f"lower must lie in [0, 1], got {self.lower}")
        if self.upper is not None and not 1 <= self.upper < math.inf:
            problems.append(f"upper must be finite and at least 1, got {self.upper}")
        if self.outside == "mask" and not self.bounded:
            problems.append('outside = "mask" needs lower or upper: without bounds nothing is outside')
        if self.outside == "truncate" and self.old == "rollout" and self.bounded:
            problems.append(
                'outside = "truncate" bounds nothing with old = "rollout", whose weights are 1: '
                'use outside = "mask", or the clip of the loss'
            )
        return problems


@dataclass(frozen=True)
class Diagnostics:
    """What the weights did. Shares and `weight_mean` are over tokens; the others over the level's units.

    log_ratio_min, log_ratio_max: of the ratio before bounds. ess: its effective sample size as a share, in (0, 1].
    """

    weight_mean: float
    clipped_share: float
    masked_share: float
    log_ratio_min: float
    log_ratio_max: float
    ess: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Corrected:
    """fp32 [n] each, without gradient: the policy that the loss clips around, and the weights of its terms."""

    old: torch.Tensor
    weights: torch.Tensor
    diagnostics: Diagnostics


def correct(
    rollout: torch.Tensor,
    proximal: torch.Tensor,
    current: torch.Tensor,
    cu_seqlens: torch.Tensor,
    settings: Correction,
) -> Corrected:
    """Weights from the three policies' log-probabilities of the same sampled tokens, fp32 [n] each (module docstring).

    cu_seqlens: int32 or int64 [B + 1], where the responses start among the n tokens. Raises ValueError for shapes,
    dtypes or empty sequences, FloatingPointError where an input is NaN or infinite or a weight exceeds fp32.
    """
    bypass = settings.old == "rollout"
    to_proximal, to_current = log_ratios(rollout, proximal), log_ratios(rollout, current)
    lengths = sequence_lengths(cu_seqlens, rollout.numel())
    units = at_level(to_current if bypass else to_proximal, lengths, settings.level)
    ratio = units.exp()  # may be infinite: the bounds below see that, and so does _finite
    outside = ratio < settings.lower
    if settings.upper is not None:
        outside |= ratio > settings.upper
    weights = torch.ones_like(ratio) if bypass else ratio
    if settings.outside == "mask":
        weights = torch.where(outside, 0.0, weights)
    elif not bypass:
        weights = weights.clamp(settings.lower, settings.upper)
    if settings.level != "token":
        weights, outside = weights.repeat_interleave(lengths), outside.repeat_interleave(lengths)
    share = float(outside.double().mean())
    diagnostics = Diagnostics(
        weight_mean=float(weights.mean()),
        clipped_share=share if settings.outside == "truncate" else 0.0,
        masked_share=share if settings.outside == "mask" else 0.0,
        log_ratio_min=float(units.min()),
        log_ratio_max=float(units.max()),
        ess=effective_sample_size(units),
    )
    return Corrected((rollout if bypass else proximal).detach(), _finite(weights), diagnostics)


def _finite(weights: torch.Tensor) -> torch.Tensor:
    """The weights, rounded once to fp32."""
    rounded = weights.float()
    if not bool(torch.isfinite(rounded).all()):
        largest = float(weights.max())
        raise FloatingPointError(f"an importance weight of {largest:g} exceeds float32: set an upper bound")
    return rounded
