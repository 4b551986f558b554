"""Where the Hugging Face tensors lie in a rank's own parameters: what a weight transfer needs to know of a trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from zerokl.alignment.megatron.convert import hf_blocks
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.shard import Held, Piece, State, empty_weights


class Block(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a Hugging Face tensor, in a parameter's rows from ``row`` on.

    Tensors and parameters count as matrices whose columns are their last dimension (one column for vectors). A block
    fills the parameter's rows.
    """

    tensor: str
    top: int
    bottom: int
    left: int
    right: int
    parameter: str
    row: int


class _Run(NamedTuple):
    """``rows`` rows of a whole Megatron tensor from ``start`` on are those of a Hugging Face tensor from ``top`` on."""

    tensor: str
    top: int
    start: int
    rows: int


def blocks(config: ModelConfig, held: Held) -> Iterator[Block]:
    """Every block of every tensor that a chunk holds (`shard.pieces`), by its own parameters' names."""
    whole = {name: torch.empty_like(tensor) for name, tensor in empty_weights(config).items()}  # each its own storage
    runs = _runs(config, whole)
    for parameter, row in held.items():
        at = 0
        for piece in row:
            first, last, left, right = _extent(whole[piece.name], piece)
            for run in runs[piece.name]:
                start, end = max(first, run.start), min(last, run.start + run.rows)
                if start < end:
                    top = run.top + start - run.start
                    yield Block(run.tensor, top, top + end - start, left, right, parameter, at + start - first)
            at += last - first


def _runs(config: ModelConfig, whole: State) -> dict[str, list[_Run]]:
    """Whole Megatron tensor's name -> the runs of rows that it consists of."""
    names = {id(tensor): name for name, tensor in whole.items()}
    runs: dict[str, list[_Run]] = {name: [] for name in whole}
    for tensor, parts in hf_blocks(config, whole):
        top = 0
        for part in parts:
            owner = part if part._base is None else part._base
            runs[names[id(owner)]].append(_Run(tensor, top, part.storage_offset() // _columns(owner), _rows(part)))
            top += _rows(part)
    return runs


def _extent(whole: torch.Tensor, piece: Piece) -> tuple[int, int, int, int]:
    """First row, last row, first column, last column of a piece."""
    rows, columns = _rows(whole), _columns(whole)
    if piece.dim == 0:
        size = rows // piece.count
        return piece.index * size, (piece.index + 1) * size, 0, columns
    size = columns // piece.count
    return 0, rows, piece.index * size, (piece.index + 1) * size


def _columns(tensor: torch.Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() > 1 else 1


def _rows(tensor: torch.Tensor) -> int:
    return tensor.numel() // _columns(tensor)
