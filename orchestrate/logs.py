"""Where the actors' output goes: one file each in the run folder."""

from __future__ import annotations

import os
from pathlib import Path


def redirect_output(path: Path) -> None:
    """Append everything that this process and its children print (file descriptors 1 and 2) to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
