"""This rank's parts of a model's tensors, and the whole ones put together from all ranks, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from zerokl.alignment.megatron.layout import Layout, Place
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.shard import Held, Piece, State, blocks, empty_weights, pieces, put_together, take

T = TypeVar("T")

_BIAS = ".expert_bias"
_OPTIMIZER = ("main.", "exp_avg.", "exp_avg_sq.")


@dataclass(frozen=True)
class Holding:
    """Which rank of torch.distributed holds what of the model.

    held: per chunk of this rank, in order of depth, what each of its tensors is made of; owners: the first rank that
    holds a piece, None where every rank holds all; empty: the whole tensors without memory, by Megatron's names.
    """

    held: Sequence[Held]
    owners: Mapping[Piece, int] | None
    empty: State

    @staticmethod
    def of(config: ModelConfig, layout: Layout) -> Holding:
        """In a layout over all ranks. Raises LayoutError if model or ranks do not divide."""
        world = dist.get_world_size()
        chunks: dict[Place, Held] = {}
        owners: dict[Piece, int] = {}
        for rank in range(world):
            for place in layout.places(rank, world):
                if place not in chunks:
                    chunks[place] = pieces(config, layout, place)
                    for piece in [piece for row in chunks[place].values() for piece in row]:
                        owners.setdefault(piece, rank)
        mine = [chunks[place] for place in layout.places(dist.get_rank(), world)]
        return Holding(mine, owners if layout.shards_weights else None, empty_weights(config))

    @staticmethod
    def alone(tensors: State) -> Holding:
        """All ``tensors`` whole on every rank, under their own names."""
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        return Holding([{name: [Piece(name)] for name in tensors}], None, empty)

    def optimizer(self) -> Holding:
        """The same for the optimizer's state: three fp32 tensors for each that is trained, named after it."""
        kinds, owners = _OPTIMIZER, self.owners
        return Holding(
            [
                {kind + name: [_of(kind, piece) for piece in row] for kind in kinds for name, row in _trained(held)}
                for held in self.held
            ],
            None if owners is None else {_of(kind, piece): rank for kind in kinds for piece, rank in owners.items()},
            {kind + name: tensor.float() for kind in kinds for name, tensor in _trained(self.empty)},
        )

    def copy(self, whole: State, chunks: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Copy this rank's parts of ``whole`` into the tensors of its chunks, which must be those held."""
        for held, tensors in zip(self.held, chunks, strict=True):
            if held.keys() != tensors.keys():
                raise RuntimeError(f"tensor names differ: {sorted(held.keys() ^ tensors.keys())[:8]}")
            for name, row in held.items():
                tensors[name].detach().copy_(take(whole[row[0].name], row))


def _of(kind: str, piece: Piece) -> Piece:
    return replace(piece, name=kind + piece.name)


def _trained(named: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    return ((name, value) for name, value in named.items() if not name.endswith(_BIAS))


def chunk_weights(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, and what is not trained but belongs to the model: the routers' selection biases. Live tensors."""
    return {name: tensor.detach() for name, tensor in live_tensors(chunk).items()}


def live_tensors(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same, the module's own objects."""
    biases = {name: buffer for name, buffer in chunk.named_buffers() if name.endswith(_BIAS)}
    return dict(chunk.named_parameters()) | biases


class WholeTensors(Mapping[str, torch.Tensor]):
    """The whole model's tensors; each is put together when it is asked for, a view where this rank holds it in one.

    Where ranks hold parts, all of them must ask for the same names in the same order: a piece travels from its owner
    to all others. ``empty``: the same without memory.
    """

    def __init__(self, holding: Holding, chunks: Sequence[State]) -> None:
        """``chunks``: this rank's tensors, as ``holding`` names them."""
        self.empty = holding.empty
        own = {
            piece: block
            for held, tensors in zip(holding.held, chunks, strict=True)
            for name, row in held.items()
            for piece, block in blocks(tensors[name].detach(), row)
        }
        self._own, self._alone = own, holding.owners is None
        self._pieces: dict[str, list[tuple[Piece, int]]] = {}
        for piece in own if holding.owners is None else holding.owners:
            owner = dist.get_rank() if holding.owners is None else holding.owners[piece]
            self._pieces.setdefault(piece.name, []).append((piece, owner))
        self._device = next(iter(own.values())).device

    def __getitem__(self, name: str) -> torch.Tensor:
        return put_together({piece: self._piece(piece, owner) for piece, owner in self._pieces[name]})

    def _piece(self, piece: Piece, owner: int) -> torch.Tensor:
        if self._alone:
            return self._own[piece]
        if owner == dist.get_rank():
            block = self._own[piece].contiguous()
        else:
            whole = self.empty[piece.name]
            block = torch.empty(piece.of(whole).shape, dtype=whole.dtype, device=self._device)
        dist.broadcast(block.view(torch.uint8), owner)
        return block

    def __iter__(self) -> Iterator[str]:
        return iter(self.empty)

    def __len__(self) -> int:
        return len(self.empty)
