"""Data that finds rounding mistakes: integer hashes with cancellation, wide exponents, subnormals, ties, both zeros."""

from __future__ import annotations

import numpy as np
import torch


def hashed(*shape: int, seed: int, kind: str = "plain") -> torch.Tensor:
    """A bf16 tensor from an integer hash. Kinds: plain (|x| < 1), wide (2^-20..2^20), tiny (subnormals), cancel."""
    n = int(np.prod(shape)) if shape else 1
    i = np.arange(n, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    i = (i ^ (i >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    i = (i ^ (i >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    i ^= i >> np.uint64(31)
    unit = (i >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0
    if kind == "wide":
        unit = unit * 2.0 ** ((i % np.uint64(41)).astype(np.float64) - 20)
    elif kind == "tiny":
        unit = unit * 2.0**-126
    elif kind == "cancel":
        # neighbours that nearly cancel, with exact ties and both zeros sprinkled in
        unit = np.where(np.arange(n) % 2 == 1, -np.roll(unit, 1) * (1 + 2.0**-8), unit)
        unit = np.where(i % np.uint64(11) == 0, 0.0, unit)
        unit = np.where(i % np.uint64(13) == 0, -0.0, unit)
    elif kind != "plain":
        raise ValueError(kind)
    return torch.from_numpy(unit.astype(np.float32)).reshape(shape).bfloat16()


def tie(k: torch.Tensor, v: torch.Tensor) -> None:
    """Turns keys [n, Hk, D] and values of one sequence into pairs of equal keys with neighbouring values, in place.

    The mean of two neighbours is a tie of bf16, all pairs have the same one, and weights within a pair are equal. So an
    output that sees whole pairs is decided by the last bit of every sum, product and quotient on its way.
    """
    k[1::2] = k[: len(k) // 2 * 2 : 2]
    v[:] = v[:1].clone()
    v[1::2] = (v[1::2].view(torch.int16) + 1).view(torch.bfloat16)


def cut_edges() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [3, 128], targets [3], top_p [3]) whose cut the last bit of a sum decides; all but the second are kept.

    Equal entries, where the mass before the 65th is the limit itself; then one entry before 127 of 2^-25 of it, none of
    which fp32 adds to the mass before the last.
    """
    logits = torch.zeros(3, 128)
    logits[2, 1:] = -25 * float(np.log(2.0))
    return logits, torch.tensor([63, 64, 127]), torch.tensor([0.5, 0.5, 1 - 2.0**-20])


def f32(t: torch.Tensor) -> np.ndarray:
    """A tensor as the fp32 array the reference takes."""
    return t.detach().float().numpy()


def assert_same_bits(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, what: str) -> None:
    """Byte equality (NaN equals NaN); names the first element that differs."""
    a = f32(actual) if isinstance(actual, torch.Tensor) else np.asarray(actual, dtype=np.float32)
    b = f32(expected) if isinstance(expected, torch.Tensor) else np.asarray(expected, dtype=np.float32)
    assert a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape}"
    differ = (np.ascontiguousarray(a).view(np.uint32) != np.ascontiguousarray(b).view(np.uint32)) & ~(
        np.isnan(a) & np.isnan(b)
    )
    if differ.any():
        at = tuple(int(x) for x in np.argwhere(differ)[0])
        raise AssertionError(f"{what}: {int(differ.sum())} of {a.size} differ, first at {at}: {a[at]!r} != {b[at]!r}")
