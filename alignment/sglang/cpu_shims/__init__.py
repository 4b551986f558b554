"""Stand-ins for two packages SGLang imports and that have no CPU build.

SGLang 0.5.23 imports `sgl_kernel` on every CPU engine and `torchvision` for the multimodal model configs it registers,
text models included. Neither has a wheel for a machine without a GPU. This folder holds the least that lets the imports
succeed; nothing in it computes anything that reaches a log-probability, and every name raises when it is called.

`activate` puts the folder on ``sys.path``. Only an engine child process calls it, and only where CUDA does not exist: a
real installation of either package is never shadowed for anyone else.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_HERE = Path(__file__).parent


def activate() -> tuple[str, ...]:
    """Append this folder to ``sys.path`` if a package it stands in for is missing; return the names it provides.

    Appending, not prepending, lets an installed package win. Processes that SGLang spawns inherit the path.
    """
    missing = tuple(name for name in ("sgl_kernel", "torchvision") if importlib.util.find_spec(name) is None)
    if missing and str(_HERE) not in sys.path:
        sys.path.append(str(_HERE))
    return missing
