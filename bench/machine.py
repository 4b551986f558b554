"""What every benchmark prints about where it ran."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; "missing" where a package is not there."""

    def one(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    return {name: one(name) for name in packages}


def describe(*packages: str) -> str:
    """Machine, versions and command, as one block of text."""
    found = ", ".join(f"{k} {v}" for k, v in versions("zerokl", "torch", *packages).items())
    return "\n".join(
        (
            f"machine:  {cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            f"versions: Python {platform.python_version()}, {found}",
            f"command:  {' '.join(sys.argv)}",
        )
    )
