"""Folders that appear whole or not at all: training checkpoints and exported models.

A checkpoint is two safetensors files and ``checkpoint.json``, which records step, sizes and digests of both. It is
written beside its final name, synced to disk, and renamed; reading it verifies every byte. It holds whole tensors,
whatever layout the model was in: a run saved in one continues in another, and the files are the same, byte for byte.
(Megatron's own distributed checkpoint is not used for this: its metadata can carry code. See `sharded_checkpoint`.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from zerokl.alignment.megatron import streams
from zerokl.alignment.megatron.parts import WholeTensors

FORMAT = 1
_MANIFEST = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the cause and the remedy."""


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path | None]:
    """On the first rank a scratch folder that becomes ``target`` when the block ends well, and vanishes when it does
    not; None on the others, which wait for that.

    Raises CheckpointError if ``target`` exists: nothing is overwritten.
    """
    target = Path(target).absolute()
    if target.exists():
        raise CheckpointError(f"{target} already exists: remove it or choose another folder")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        dist.barrier()  # every rank has looked before the folder appears
    if ranks == 1 or dist.get_rank() == 0:
        with _scratch_for(target) as folder:
            yield folder
    else:
        yield None
    if ranks > 1:
        dist.barrier()


@contextmanager
def _scratch_for(target: Path) -> Iterator[Path]:
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


def save(target: str | Path, files: Mapping[str, WholeTensors], metadata: Mapping[str, Any]) -> None:
    """Write ``files`` (file stem -> the whole model's tensors) and JSON ``metadata`` as one checkpoint folder.

    All ranks call it, the first one writes; none returns before the folder is complete.
    """
    with atomic_folder(target) as folder:
        sizes = {}
        for stem, tensors in files.items():
            path = None if folder is None else folder / f"{stem}.safetensors"
            streams.write(path, tensors.empty, ((name, tensors[name]) for name in tensors))
            if path is not None:
                sizes[path.name] = {"bytes": path.stat().st_size, "xxh3_128": _file_digest(path)}
        manifest = {"format": FORMAT, "files": sizes, "metadata": dict(metadata)}
        text = json.dumps(manifest, indent=2) + "\n"
        if folder is not None:
            (folder / _MANIFEST).write_text(text, encoding="utf-8")


@contextmanager
def load(source: str | Path) -> Iterator[tuple[dict[str, streams.Reader], dict[str, Any]]]:
    """The files of a checkpoint by their stems, open, and its metadata. Raises CheckpointError if any byte is missing
    or changed."""
    folder = Path(source)
    manifest = _read_manifest(folder)
    with ExitStack() as exit_stack:
        files = {}
        for name, expected in manifest["files"].items():
            path = folder / Path(name).name
            size = path.stat().st_size if path.is_file() else 0
            if size != expected["bytes"] or _file_digest(path) != expected["xxh3_128"]:
                raise CheckpointError(
                    f"{path} is torn or changed ({size} bytes, {expected['bytes']} were written): resume from an "
                    "earlier checkpoint"
                )
            files[path.stem] = exit_stack.enter_context(streams.Reader(path))
        yield files, manifest["metadata"]


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
