"""Folders that appear whole or not at all: training checkpoints and exported models.

A checkpoint is two safetensors files and ``checkpoint.json``, which records step, sizes and digests of both. It is
written beside its final name, synced to disk, and renamed; reading it verifies every byte.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file

from zerokl.alignment.megatron.convert import read_safetensors

FORMAT = 1
_MANIFEST = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the cause and the remedy."""


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A scratch folder that becomes ``target`` when the block ends well, and vanishes when it does not.

    Raises CheckpointError if ``target`` exists: nothing is overwritten.
    """
    target = Path(target).absolute()
    if target.exists():
        raise CheckpointError(f"{target} already exists: remove it or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)  # what an earlier process of the same id left when it was killed
    scratch.mkdir()
    try:
        yield scratch
        for path in [*scratch.iterdir(), scratch]:
            _sync(path)
        scratch.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(target: str | Path, files: Mapping[str, Mapping[str, torch.Tensor]], metadata: Mapping[str, Any]) -> None:
    """Write ``files`` (file stem -> name -> tensor) and JSON ``metadata`` as one checkpoint folder."""
    with atomic_folder(target) as folder:
        sizes = {}
        for stem, tensors in files.items():
            path = folder / f"{stem}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            sizes[path.name] = {"bytes": path.stat().st_size, "xxh3_128": _file_digest(path)}
        manifest = {"format": FORMAT, "files": sizes, "metadata": dict(metadata)}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load(source: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The files and metadata of a checkpoint. Raises CheckpointError if any byte is missing or changed."""
    folder = Path(source)
    manifest = _read_manifest(folder)
    files = {}
    for name, expected in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != expected["bytes"] or _file_digest(path) != expected["xxh3_128"]:
            raise CheckpointError(
                f"{path} is torn or changed ({size} bytes, {expected['bytes']} were written): resume from an earlier "
                "checkpoint"
            )
        files[path.stem] = read_safetensors(path)
    return files, manifest["metadata"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = manifest["format"] == FORMAT and {"files", "metadata"} <= manifest.keys()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {folder} is not a complete checkpoint") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): resume from an earlier checkpoint") from error
    if not complete:
        raise CheckpointError(f"{path} has another format than {FORMAT}: use the version of zerokl that wrote it")
    return manifest


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
