"""Weights in Megatron's distributed checkpoint format: saved by the ranks of one layout, loaded by those of another.

The checkpoint holds whole tensors under the whole model's names (`convert.hf_to_megatron`), whatever the layout was:
each rank describes what it holds as blocks of them (`shard.pieces`), and Megatron reads and writes the blocks.
Optimizer state is not part of it. All processes of the default group call `save` and `load` together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.convert import hf_dtype, hf_shapes, hf_to_megatron
from zerokl.alignment.megatron.core import ShardedTensor, dist_checkpointing
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.shard import Layout, Piece, Rank, cut, pieces

_MODEL = "model"


def save(
    target: str | Path, config: ModelConfig, layout: Layout, places: Sequence[Rank], state: Mapping[str, torch.Tensor]
) -> None:
    """Write the model's weights into the existing empty folder ``target``.

    ``places``: where in ``layout`` each process of the default group is, by its rank (replicas repeat a place);
    ``state``: this process's parameters, as `shard.shard` names them.
    """
    described = _describe(config, layout, places, state)
    dist_checkpointing.save({"weights": described}, str(target), content_metadata={_MODEL: json.dumps(asdict(config))})


def load(source: str | Path, config: ModelConfig, layout: Layout, places: Sequence[Rank]) -> dict[str, torch.Tensor]:
    """This process's parameters in ``layout`` from a checkpoint of any layout.

    Raises CheckpointError if ``source`` holds another model.
    """
    metadata = dist_checkpointing.load_content_metadata(str(source))
    if metadata is None or metadata.get(_MODEL) != json.dumps(asdict(config)):
        raise CheckpointError(f"{source} holds the weights of another model: start from the model it was made with")
    place = places[dist.get_rank()]
    local = cut(config, _unset(config), layout, place)
    buffers = {name: torch.empty_like(tensor, device="cpu") for name, tensor in local.items()}
    described = _describe(config, layout, places, buffers)
    read = dist_checkpointing.load({"weights": described}, str(source))["weights"]
    dims = {name: row[0].dim for name, row in pieces(config, layout, place).items()}
    return {name: torch.cat(row, dims[name]) for name, row in read.items()}


def _describe(
    config: ModelConfig, layout: Layout, places: Sequence[Rank], state: Mapping[str, torch.Tensor]
) -> dict[str, list[ShardedTensor]]:
    """This process's tensors as Megatron's blocks of global ones; the first process that holds a block writes it."""
    process = dist.get_rank()
    held = pieces(config, layout, places[process])
    copies: dict[Piece, int] = {}  # how many processes before this one, and tensors of this one, hold the block
    for place in places[:process]:
        for piece in {piece for row in pieces(config, layout, place).values() for piece in row}:
            copies[piece] = copies.get(piece, 0) + 1
    described: dict[str, list[ShardedTensor]] = {}
    for name, row in held.items():
        described[name] = []
        for piece, block in zip(row, state[name].chunk(len(row), row[0].dim), strict=True):
            offsets = (piece.dim, piece.index, piece.count)
            tensor = ShardedTensor.from_rank_offsets(
                piece.name, block.contiguous(), offsets, replica_id=copies.setdefault(piece, 0)
            )
            described[name].append(tensor)
    return described


def _unset(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The whole model's tensors without memory; only shapes and types matter."""
    shapes = hf_shapes(config).items()
    return hf_to_megatron(config, {n: torch.empty(shape, dtype=hf_dtype(n), device="meta") for n, shape in shapes})
