"""Errors of weight transfer."""

from __future__ import annotations


class WeightSyncError(RuntimeError):
    """Weights did not arrive as they were sent. The message names the tensor and the cause."""
