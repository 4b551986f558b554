"""Tiles that a tuning run chose (written by `python -m zerokl.bench.autotune`); other shapes use `linear_config`.

Tiles change speed, never bits: every entry was byte-equal to the heuristic's when it was chosen.
"""

from __future__ import annotations

from .linear_config import LinearConfig

LINEAR: dict[tuple[int, int, int], LinearConfig] = {}
"""By (rows rounded up to a power of two, N, K). Empty: no GPU has run the tuning yet."""
