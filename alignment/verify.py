"""The comparison the project is judged by: two arrays of log-probabilities, token by token, as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from zerokl.alignment.mismatch import Kl, kl_estimates
from zerokl.alignment.types import Generation


@dataclass(frozen=True)
class Mismatch:
    """One token whose bits differ: which request, which of its generated tokens, the token and both values in hex."""

    request: int
    position: int
    token: int
    rollout: str
    trainer: str


@dataclass(frozen=True)
class Comparison:
    """What a comparison found. ``equal`` is the verdict; NaN, Inf and an empty comparison are never equal.

    ``max_abs_diff`` and ``kl`` are NaN where a value is not finite or nothing was compared.
    """

    tokens: int
    mismatched_tokens: int
    nonfinite: int
    max_abs_diff: float
    kl: Kl
    first_mismatch: Mismatch | None

    @property
    def equal(self) -> bool:
        return self.tokens > 0 and self.mismatched_tokens == 0

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values: NaN becomes null."""

        def plain(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "tokens": self.tokens,
            "mismatched_tokens": self.mismatched_tokens,
            "max_abs_diff": plain(self.max_abs_diff),
            "kl": {name: plain(value) for name, value in asdict(self.kl).items()},
            "nonfinite": self.nonfinite,
            "first_mismatch": asdict(self.first_mismatch) if self.first_mismatch else None,
        }


def mismatches(rollout: np.ndarray, trainer: np.ndarray) -> np.ndarray:
    """bool [n]: where two fp32 [n] arrays differ as bits, or either value is not finite (equal NaNs included)."""
    if rollout.shape != trainer.shape or rollout.ndim != 1:
        raise ValueError(f"cannot compare shapes {rollout.shape} and {trainer.shape}: every token needs both values")
    if rollout.dtype != np.float32 or trainer.dtype != np.float32:
        raise ValueError(f"bits are compared as float32, got {rollout.dtype} and {trainer.dtype}")
    bits = np.ascontiguousarray(rollout).view(np.int32) != np.ascontiguousarray(trainer).view(np.int32)
    return bits | ~np.isfinite(rollout) | ~np.isfinite(trainer)


def compare(generations: Sequence[Generation], trainer: Sequence[np.ndarray]) -> Comparison:
    """Compare every generation's log-probabilities as decoded with the trainer's fp32 [n] for the same tokens.

    Raises ValueError where the counts differ: a token without a partner is an error of the caller, not a mismatch.
    """
    if len(generations) != len(trainer):
        raise ValueError(f"{len(generations)} generations but {len(trainer)} arrays of trainer log-probabilities")
    for index, (generation, other) in enumerate(zip(generations, trainer, strict=True)):
        if not len(generation.output_ids) == len(generation.logprobs) == len(other):
            raise ValueError(
                f"request {index}: {len(generation.output_ids)} tokens, {len(generation.logprobs)} rollout and "
                f"{len(other)} trainer log-probabilities"
            )
    ours = np.concatenate([g.logprobs for g in generations] or [np.empty(0, np.float32)])
    theirs = np.concatenate([*trainer] or [np.empty(0, np.float32)])
    different = mismatches(ours, theirs)
    finite = np.isfinite(ours) & np.isfinite(theirs)
    exact = ours.size > 0 and bool(finite.all())
    return Comparison(
        tokens=int(ours.size),
        mismatched_tokens=int(different.sum()),
        nonfinite=int((~finite).sum()),
        max_abs_diff=float(np.abs(ours.astype(np.float64) - theirs).max()) if exact else float("nan"),
        kl=kl_estimates(ours, theirs),
        first_mismatch=_first(generations, ours, theirs, different),
    )


def _first(
    generations: Sequence[Generation], ours: np.ndarray, theirs: np.ndarray, different: np.ndarray
) -> Mismatch | None:
    where = np.flatnonzero(different)
    if where.size == 0:
        return None
    at = int(where[0])
    request, position = 0, at
    while position >= len(generations[request].output_ids):
        position -= len(generations[request].output_ids)
        request += 1
    token = generations[request].output_ids[position]
    return Mismatch(request, position, int(token), _hex(ours[at]), _hex(theirs[at]))


def _hex(value: np.float32) -> str:
    """The value's bits and decimal, e.g. `0xbf800000 (-1.0)`."""
    return f"0x{int(np.float32(value).view(np.uint32)):08x} ({float(value)!r})"
