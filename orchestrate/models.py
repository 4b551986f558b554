"""Models by name or folder: fetch, make tiny ones, and refuse what cannot be run before anything starts."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Literal

import zerokl
from zerokl.alignment.architectures import Architecture
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.orchestrate.errors import UserError
from zerokl.orchestrate.files import new_folder, write_json

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe"]
NAMES = ("smollm2-135m",)

_RECORD = "zerokl_model.json"  # what a folder made by this module holds: the model's name and its weights' SHA-256


def cache_folder() -> Path:
    """`models/` of the checkout this code runs from, else the user's cache folder."""
    checkout = Path(zerokl.__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zerokl" / "models"


def resolve(name_or_folder: str, architecture: Architecture | None = None) -> Path:
    """The checked model folder for `--model`: a known name (fetched where absent) or a folder."""
    folder = Path(name_or_folder).expanduser()
    if not folder.is_dir() and name_or_folder in NAMES:
        return fetch(name_or_folder)
    if not folder.is_dir():
        raise UserError(
            f"no model at {name_or_folder!r}: neither a folder nor a known name ({', '.join(NAMES)})",
            "give a Hugging Face model folder, or `zerokl model fetch smollm2-135m`",
        )
    check(folder, architecture)
    return folder.resolve()


def fetch(name: str, out: Path | None = None) -> Path:
    """Make the named model's folder (default: under `cache_folder()`) and return it.

    A folder made earlier is verified against its recorded SHA-256 and kept; a damaged one is made again.
    """
    if name not in NAMES:
        raise UserError(f"no model is called {name!r}", f"known names: {', '.join(NAMES)}")
    folder = (out or cache_folder() / name).expanduser().resolve()
    if folder.exists():
        if _is_intact(folder, name):
            return folder
        _refuse_foreign(folder)
    from zerokl.orchestrate import gguf

    with new_folder(folder) as fresh:
        gguf.convert(fresh)
        write_json(fresh / _RECORD, {"name": name, "sha256": _sha256(fresh / "model.safetensors")})
        check(fresh)
    return folder


def tiny(family: Family, out: Path, *, seed: int = 0) -> Path:
    """Make a tiny random model of the family at `out`: 2 layers, head size 64, grouped queries, byte tokenizer."""
    folder = out.expanduser().resolve()
    if folder.exists():
        _refuse_foreign(folder)
    from zerokl.orchestrate import tiny as maker

    with new_folder(folder) as fresh:
        maker.make(family, fresh, seed=seed)
        write_json(fresh / _RECORD, {"name": f"tiny-{family}", "sha256": _sha256(fresh / "model.safetensors")})
        check(fresh)
    return folder


def check(folder: Path, architecture: Architecture | None = None) -> ModelConfig:
    """Raise UserError unless `folder` holds a whole model of a supported architecture; returns its configuration.

    `architecture`: one besides those of the package.
    """
    try:
        config = ModelConfig.load(folder, architecture)
    except ModelError as error:
        raise UserError(str(error)) from error
    for name in _weight_files(folder):
        _check_safetensors(folder / name)
    return config


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is damaged: {error!r}", "copy the model again") from error
    return ["model.safetensors"]


def _check_safetensors(path: Path) -> None:
    """The header is readable and the file is exactly as long as the header says: catches an interrupted copy."""
    if not path.is_file():
        raise UserError(f"{path} is missing", "the model folder needs safetensors weights; copy the model again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if 8 + length > size:
                raise ValueError(f"the header wants {length} bytes")
            header = json.loads(file.read(length))
        expected = 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})", "copy or fetch the model again") from error
    if expected != size:
        word = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path} is {word}: {size} bytes where its header says {expected}", "copy or fetch the model again"
        )


def _is_intact(folder: Path, name: str) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        check(folder)
        return record == {"name": name, "sha256": _sha256(folder / "model.safetensors")}
    except (OSError, ValueError, UserError):
        return False


def _refuse_foreign(folder: Path) -> None:
    """Only an empty folder or one that this module made may be replaced."""
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _RECORD).is_file()):
        raise UserError(f"{folder} exists and was not made by `zerokl model`", "choose another --out")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
