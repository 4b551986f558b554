"""How Megatron cuts a model's weights: which blocks of the whole tensors a chunk of the model holds.

Pure functions; no process group is asked. Each local tensor is a row of `Piece`s, one block of one tensor of the whole
model each. Loading, gathering and saving weights and optimizer state and describing them to Megatron's distributed
checkpoint (`sharded_checkpoint`) all follow `pieces`. The rules are Megatron's:

- tensor parallel (Shoeybi et al., "Megatron-LM", 2019): ``linear_qkv`` by key-value groups, ``linear_fc1`` by rows of
  its gate half and of its up half, the embedding and the head by vocabulary (no row is added), ``linear_proj`` and
  ``linear_fc2`` by columns; norms and routers are whole on every rank;
- pipeline parallel: equal runs of layers, numbered from 0 on each stage; the embedding on the first stage, final norm
  and head on the last. A tied head is the embedding's copy there;
- expert parallel: equal runs of experts, each whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from zerokl.alignment.megatron.convert import hf_dtype, hf_shapes, hf_to_megatron, megatron_to_hf
from zerokl.alignment.megatron.layout import Layout, Place
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError

_EMBEDDING, _FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
_HEAD = "output_layer.weight"

State = Mapping[str, torch.Tensor]
Held = Mapping[str, "list[Piece]"]
"""Local tensor name -> the pieces that it concatenates, along their ``dim``."""


@dataclass(frozen=True)
class Piece:
    """Block ``index`` of ``count`` equal ones along ``dim`` of the whole model's tensor ``name``."""

    name: str
    dim: int = 0
    index: int = 0
    count: int = 1

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The block, as a view."""
        return whole.chunk(self.count, self.dim)[self.index]


def pieces(config: ModelConfig, layout: Layout, place: Place) -> dict[str, list[Piece]]:
    """What the chunk at ``place`` holds, by its own parameters' names.

    Raises LayoutError for a layout that the model does not divide into, ValueError for a place outside the layout.
    """
    layout.check(config)
    if not all(0 <= at < size for at, size in zip(place, (layout.tensor, layout.stages, layout.expert), strict=True)):
        raise ValueError(f"{place} is outside {layout}")
    last = layout.stages - 1
    held: dict[str, list[Piece]] = {}
    if place.stage == 0:
        held[_EMBEDDING] = _split(_EMBEDDING, 0, layout, place)
    for local, index in enumerate(layout.layers(place, config)):
        for name in _layer_names(config, index):
            held[f"decoder.layers.{local}.{name}"] = _cut(f"decoder.layers.{index}.{name}", layout, place)
    if place.stage == last:
        held[_FINAL_NORM] = [Piece(_FINAL_NORM)]
        if not config.tie_word_embeddings:
            held[_HEAD] = _split(_HEAD, 0, layout, place)
        elif last > 0:
            held[_HEAD] = _split(_EMBEDDING, 0, layout, place)
    return held


def take(whole: torch.Tensor, row: list[Piece]) -> torch.Tensor:
    """A local tensor from the whole one that its pieces are of; a view where it is one block."""
    return row[0].of(whole) if len(row) == 1 else torch.cat([piece.of(whole) for piece in row], row[0].dim)


def blocks(local: torch.Tensor, row: list[Piece]) -> list[tuple[Piece, torch.Tensor]]:
    """The reverse: each piece of a local tensor with its block, a view."""
    return list(zip(row, local.chunk(len(row), row[0].dim), strict=True))


def put_together(parts: Mapping[Piece, torch.Tensor]) -> torch.Tensor:
    """A whole tensor from all of its pieces."""
    ordered = sorted(parts, key=lambda piece: piece.index)
    return parts[ordered[0]] if len(parts) == 1 else torch.cat([parts[piece] for piece in ordered], ordered[0].dim)


def empty_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The whole model's tensors by Megatron's names, without memory: shapes and types."""
    shapes = hf_shapes(config).items()
    return hf_to_megatron(config, {n: torch.empty(shape, dtype=hf_dtype(n), device="meta") for n, shape in shapes})


def shard(config: ModelConfig, hf: State, layout: Layout, place: Place) -> dict[str, torch.Tensor]:
    """A chunk's parameters from a complete Hugging Face state (`convert.hf_shapes`). Raises as `pieces`."""
    whole = hf_to_megatron(config, hf)
    return {name: take(whole[row[0].name], row).contiguous() for name, row in pieces(config, layout, place).items()}


def join(config: ModelConfig, layout: Layout, shards: Mapping[Place, State]) -> dict[str, torch.Tensor]:
    """The Hugging Face state from the parameters of chunks that together hold the whole model.

    Raises ModelError naming a tensor that is missing or unexpected, and one whose copies in several chunks differ in
    any bit: replicas that drifted apart have no joint value.
    """
    found: dict[str, dict[Piece, torch.Tensor]] = {}
    for place, state in shards.items():
        held = pieces(config, layout, place)
        if odd := sorted(held.keys() ^ state.keys()):
            raise ModelError(f"{place} holds other tensors than the model has there: {', '.join(odd[:8])}")
        for name, row in held.items():
            for piece, block in blocks(state[name], row):
                if not _same_bits(found.setdefault(piece.name, {}).setdefault(piece, block), block):
                    raise ModelError(f"{place} holds another {piece.name} than one before it: replicas must be equal")
    needed = every_piece(pieces(config, layout, place) for place in layout.every_place())
    if missing := sorted(name for name, row in needed.items() if row != set(found.get(name, {}))):
        raise ModelError(f"nothing given holds all of {', '.join(missing[:8])}: give the parameters of more ranks")
    return dict(megatron_to_hf(config, {name: put_together(parts) for name, parts in found.items()}))


def every_piece(chunks: Iterable[Held]) -> dict[str, set[Piece]]:
    """Whole tensor's name -> its pieces in any of the chunks."""
    needed: dict[str, set[Piece]] = {}
    for held in chunks:
        for row in held.values():
            needed.setdefault(row[0].name, set()).update(row)
    return needed


def _layer_names(config: ModelConfig, index: int) -> list[str]:
    """Megatron's parameters (and the selection bias) of one layer, below its prefix."""
    names = ["input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"]
    if config.qkv_bias:
        names.append("self_attention.linear_qkv.bias")
    if config.qk_norm:
        names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    names.append("pre_mlp_layernorm.weight")
    moe = config.moe_at(index)
    if moe is None:
        return [*names, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    names += ["mlp.router.weight", "mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight"]
    if moe.router.bias:
        names.append("mlp.router.expert_bias")
    if moe.shared_size:
        names += ["mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"]
    return names


def _cut(name: str, layout: Layout, place: Place) -> list[Piece]:
    """How a layer's parameter lies in a chunk, by the module it belongs to."""
    owner, module = name.split(".")[-3:-1]
    if owner == "experts":
        return [Piece(name, 0, place.expert, layout.expert)]
    if module == "linear_qkv":
        return _split(name, 0, layout, place)
    if module == "linear_fc1":
        return _split(name, 0, layout, place, halves=2)
    if module in ("linear_proj", "linear_fc2"):
        return _split(name, 1, layout, place)
    return [Piece(name)]


def _split(name: str, dim: int, layout: Layout, place: Place, *, halves: int = 1) -> list[Piece]:
    """A tensor parallel rank's block of each of ``halves`` equal parts of the tensor; one block if no one shares it."""
    if layout.tensor == 1:
        return [Piece(name)]
    blocks = (half * layout.tensor + place.tensor for half in range(halves))
    return [Piece(name, dim, block, halves * layout.tensor) for block in blocks]


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, types and bytes: NaN equals itself and 0 does not equal -0."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
