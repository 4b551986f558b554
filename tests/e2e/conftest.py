"""Models for whole runs, made once a session."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zerokl.orchestrate import models

ZEROKL = str(Path(sys.executable).parent / "zerokl")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder("tiny-llama" | "tiny-qwen3" | "smollm2-135m") -> folder"""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            family = name.removeprefix("tiny-")
            made[name] = models.resolve(name) if family == name else models.tiny(family, root / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def zerokl(tmp_path_factory):
    """zerokl("train", ...) runs the command in an empty folder and returns the finished process."""
    folder = tmp_path_factory.mktemp("cwd")

    def run(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ZEROKL, *map(str, arguments)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )

    return run
