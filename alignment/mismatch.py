"""How far two policies are apart on the tokens one of them sampled: the k1, k2 and k3 estimators of KL.

With log-probabilities `p` of the sampling policy (the rollout) and `q` of the other (the trainer) and `r = exp(q - p)`:

    k1 = -(q - p)          unbiased for KL(p || q), high variance, may be negative
    k2 = (q - p)^2 / 2     biased, low variance
    k3 = (r - 1) - (q - p) unbiased, low variance, never negative

(J. Schulman, "Approximating KL Divergence", 2020.) Equal bits give exactly 0.0 for all three.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
