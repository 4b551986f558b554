"""Weights in Megatron's distributed checkpoint format: saved by the ranks of one layout, loaded by those of another.

The checkpoint holds whole tensors under the whole model's names (`convert.hf_to_megatron`), whatever the layout was:
each rank describes what it holds as blocks of them (`shard.pieces`), and Megatron reads and writes the blocks.
For exchange with other users of Megatron; a training run's own checkpoints (`checkpoint`) hold the optimizer's state
too. All processes of the default group call `save` and `load` together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.core import ShardedTensor, dist_checkpointing
from zerokl.alignment.megatron.layout import Layout, Place
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.shard import Piece, blocks, empty_weights, pieces, take

_MODEL = "model"


def save(
    target: str | Path, config: ModelConfig, layout: Layout, places: Sequence[Place], state: Mapping[str, torch.Tensor]
) -> None:
    """Write the model's weights into the existing empty folder ``target``.

    ``places``: where in ``layout`` each process of the default group is, by its rank (replicas repeat a place);
    ``state``: this process's parameters, as `shard.shard` names them.
    """
    described = _describe(config, layout, places, state)
    dist_checkpointing.save({"weights": described}, str(target), content_metadata={_MODEL: json.dumps(asdict(config))})


def load(source: str | Path, config: ModelConfig, layout: Layout, places: Sequence[Place]) -> dict[str, torch.Tensor]:
    """This process's parameters in ``layout`` from a checkpoint of any layout.

    Only of a source that one would run code from: Megatron reads metadata that can carry some.
    Raises CheckpointError if ``source`` holds another model.
    """
    metadata = dist_checkpointing.load_content_metadata(str(source))
    if metadata is None or metadata.get(_MODEL) != json.dumps(asdict(config)):
        raise CheckpointError(f"{source} holds the weights of another model: start from the model it was made with")
    held, empty = pieces(config, layout, places[dist.get_rank()]), empty_weights(config)
    buffers = {
        name: torch.empty_like(take(empty[row[0].name], row), device="cpu").contiguous() for name, row in held.items()
    }
    described = _describe(config, layout, places, buffers)
    read = dist_checkpointing.load({"weights": described}, str(source))["weights"]
    return {name: torch.cat(row, held[name][0].dim) for name, row in read.items()}


def _describe(
    config: ModelConfig, layout: Layout, places: Sequence[Place], state: Mapping[str, torch.Tensor]
) -> dict[str, list[ShardedTensor]]:
    """This process's tensors as Megatron's blocks of global ones; the first process that holds a block writes it."""
    process = dist.get_rank()
    copies: dict[Piece, int] = {}  # how many processes before this one, and tensors of this one, hold the block
    for place in places[:process]:
        for piece in {piece for row in pieces(config, layout, place).values() for piece in row}:
            copies[piece] = copies.get(piece, 0) + 1
    described: dict[str, list[ShardedTensor]] = {}
    for name, row in pieces(config, layout, places[process]).items():
        described[name] = []
        for piece, block in blocks(state[name], row):
            offsets = (piece.dim, piece.index, piece.count)
            tensor = ShardedTensor.from_rank_offsets(
                piece.name, block.contiguous(), offsets, replica_id=copies.setdefault(piece, 0)
            )
            described[name].append(tensor)
    return described
