"""Errors of the SGLang binding."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A model, request or server option that zerokl's kernels do not define. The message names it."""


class HookError(RuntimeError):
    """A zerokl hook did not take effect, so some arithmetic would have been SGLang's own. The message names it."""


class EngineError(RuntimeError):
    """The engine process died, answered something it may not, or was asked after it closed."""


class EngineDied(EngineError):
    """The engine's process ended by itself; a new engine is needed."""
