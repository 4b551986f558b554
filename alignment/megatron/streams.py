"""Safetensors files written and read one tensor at a time, so that no process needs memory for a whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from zerokl.alignment.megatron.model_config import ModelError

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(
    path: Path | None,
    empty: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``tensors``, in whatever order they come, into a file laid out by ``empty`` (shapes and types; on meta).

    None for a path: the tensors are asked for and dropped.
    The format: 8 bytes of header length, a JSON header padded with spaces to 8 bytes, the tensors without a gap.
    Raises ValueError unless exactly the tensors of ``empty`` come.
    """
    if path is None:
        for _ in tensors:
            pass
        return
    # four-byte elements first: so every tensor lies at a multiple of its element's size
    names = sorted(empty, key=lambda name: (-empty[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        shape, dtype = list(empty[name].shape), empty[name].dtype
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = set(names)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for name, tensor in tensors:
            if name not in missing or tensor.shape != empty[name].shape or tensor.dtype != empty[name].dtype:
                raise ValueError(f"{path}: {name} {tensor.dtype} {tuple(tensor.shape)} has no place in the file")
            missing.remove(name)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors never came, {min(missing)} among them")


class Reader(Mapping[str, torch.Tensor]):
    """The tensors of a file, each read when it is asked for; a context manager that closes the file.

    Raises ModelError naming the file if it is absent, truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self._exit = ExitStack()
        try:
            self._file = self._exit.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError as error:
            raise ModelError(f"{path} does not exist: copy or download the folder again") from error
        except SafetensorError as error:
            raise ModelError(f"{path} is truncated or damaged ({error}): copy or download it again") from error
        self._names = list(self._file.keys())

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        self._exit.close()

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
