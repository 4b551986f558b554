"""The weights of one rank: a whole model in Megatron's names and layouts, cut for a parallel layout and joined again.

Pure functions; no process group is asked. Each local tensor is a row of `Piece`s, one block of one tensor of the whole
model each: cutting, joining and describing the ranks to Megatron's distributed checkpoint (`sharded_checkpoint`) all
follow `pieces`. The rules are Megatron's:

- tensor parallel (Shoeybi et al., "Megatron-LM", 2019): ``linear_qkv`` by key-value groups, ``linear_fc1`` by rows of
  its gate half and of its up half, the embedding and the head by vocabulary (no row is added), ``linear_proj`` and
  ``linear_fc2`` by columns; norms and routers are whole on every rank;
- pipeline parallel: equal runs of layers, numbered from 0 on each stage; the embedding on the first stage, final norm
  and head on the last. A tied head is the embedding's copy there;
- expert parallel: equal runs of experts, each whole, so that expert parallel ranks may be tensor parallel ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch

from zerokl.alignment.megatron.convert import hf_to_megatron, megatron_to_hf
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError

_EMBEDDING, _FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
_HEAD = "output_layer.weight"

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How many ranks share each part. ``pipeline`` counts stages: with virtual ones, ranks times virtual stages."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    def ranks(self) -> list[Rank]:
        """Every rank: what it holds depends on nothing else."""
        return [Rank(*at) for at in product(range(self.tensor), range(self.pipeline), range(self.expert))]


@dataclass(frozen=True)
class Rank:
    """A rank's place in a `Layout`, each part from 0."""

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0


@dataclass(frozen=True)
class Piece:
    """Block ``index`` of ``count`` equal ones along ``dim`` of the whole model's tensor ``name``."""

    name: str
    dim: int = 0
    index: int = 0
    count: int = 1


def pieces(config: ModelConfig, layout: Layout, rank: Rank) -> dict[str, list[Piece]]:
    """Local parameter name -> the pieces that it concatenates, along their ``dim``.

    Raises ModelError for a layout that the model does not divide into, ValueError for a rank outside the layout.
    """
    _check(config, layout, rank)
    last = layout.pipeline - 1
    held: dict[str, list[Piece]] = {}
    if rank.pipeline == 0:
        held[_EMBEDDING] = _split(_EMBEDDING, 0, layout, rank)
    per_stage = config.num_hidden_layers // layout.pipeline
    for local in range(per_stage):
        index = rank.pipeline * per_stage + local
        for name in _layer_names(config, index):
            held[f"decoder.layers.{local}.{name}"] = _cut(f"decoder.layers.{index}.{name}", layout, rank)
    if rank.pipeline == last:
        held[_FINAL_NORM] = [Piece(_FINAL_NORM)]
        if not config.tie_word_embeddings:
            held[_HEAD] = _split(_HEAD, 0, layout, rank)
        elif last > 0:
            held[_HEAD] = _split(_EMBEDDING, 0, layout, rank)
    return held


def shard(config: ModelConfig, hf: State, layout: Layout, rank: Rank) -> dict[str, torch.Tensor]:
    """The parameters of one rank from a complete Hugging Face state (`convert.hf_shapes`). Raises as `pieces`."""
    return cut(config, hf_to_megatron(config, hf), layout, rank)


def join(config: ModelConfig, layout: Layout, shards: Mapping[Rank, State]) -> dict[str, torch.Tensor]:
    """The Hugging Face state from the parameters of all ranks of ``layout``. Raises as `assemble`."""
    return dict(megatron_to_hf(config, assemble(config, layout, shards)))


def cut(config: ModelConfig, whole: State, layout: Layout, rank: Rank) -> dict[str, torch.Tensor]:
    """One rank's parameters, contiguous, from the whole model's in Megatron's layout (`convert.hf_to_megatron`)."""
    return {
        name: torch.cat([whole[p.name].chunk(p.count, p.dim)[p.index] for p in row], row[0].dim)
        for name, row in pieces(config, layout, rank).items()
    }


def assemble(config: ModelConfig, layout: Layout, shards: Mapping[Rank, State]) -> dict[str, torch.Tensor]:
    """The whole model's parameters in Megatron's layout from those of ranks that together hold it all.

    Raises ModelError naming a tensor that is missing or unexpected, and one whose copies on several ranks differ in any
    bit: replicas that drifted apart have no joint value.
    """
    blocks: dict[Piece, torch.Tensor] = {}
    for rank, state in shards.items():
        held = pieces(config, layout, rank)
        if odd := sorted(held.keys() ^ state.keys()):
            raise ModelError(f"{rank} holds other tensors than the model has there: {', '.join(odd[:8])}")
        for name, row in held.items():
            for piece, block in zip(row, state[name].chunk(len(row), row[0].dim), strict=True):
                if not _same_bits(blocks.setdefault(piece, block), block):
                    raise ModelError(f"{rank} holds another {piece.name} than a rank before it: replicas must be equal")
    missing = sorted({piece.name for piece in every_piece(config, layout) if piece not in blocks})
    if missing:
        raise ModelError(f"no rank given holds all of {', '.join(missing[:8])}: give the parameters of more ranks")
    whole: dict[str, list[torch.Tensor]] = {}
    dims = {piece.name: piece.dim for piece in blocks}
    for piece in sorted(blocks, key=lambda piece: piece.index):
        whole.setdefault(piece.name, []).append(blocks[piece])
    return {name: torch.cat(row, dims[name]) for name, row in whole.items()}


def every_piece(config: ModelConfig, layout: Layout) -> set[Piece]:
    """What the ranks of a layout hold between them."""
    held = (pieces(config, layout, rank) for rank in layout.ranks())
    return {piece for tensors in held for row in tensors.values() for piece in row}


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


def _cut(name: str, layout: Layout, rank: Rank) -> list[Piece]:
    """How a layer's parameter lies on a rank, by the module it belongs to."""
    owner, module = name.split(".")[-3:-1]
    if owner == "experts":
        return [Piece(name, 0, rank.expert, layout.expert)]
    if module == "linear_qkv":
        return _split(name, 0, layout, rank)
    if module == "linear_fc1":
        return _split(name, 0, layout, rank, halves=2)
    if module in ("linear_proj", "linear_fc2"):
        return _split(name, 1, layout, rank)
    return [Piece(name)]


def _split(name: str, dim: int, layout: Layout, rank: Rank, *, halves: int = 1) -> list[Piece]:
    """A tensor parallel rank's block of each of ``halves`` equal parts of the tensor."""
    blocks = (half * layout.tensor + rank.tensor for half in range(halves))
    return [Piece(name, dim, block, halves * layout.tensor) for block in blocks]


def _check(config: ModelConfig, layout: Layout, rank: Rank) -> None:
    for name in ("tensor", "pipeline", "expert"):
        if not 0 <= getattr(rank, name) < getattr(layout, name):
            raise ValueError(f"{rank} is outside {layout}")
    sizes = {
        "num_hidden_layers": (config.num_hidden_layers, layout.pipeline),
        "num_key_value_heads": (config.num_key_value_heads, layout.tensor),
        "vocab_size": (config.vocab_size, layout.tensor),
    }
    if config.moe_at(0) is None:
        sizes["intermediate_size"] = (config.intermediate_size, layout.tensor)
    if config.moe is None and layout.expert != 1:
        raise ModelError(f"{layout}: {config.architecture} is dense, there are no experts to share")
    if config.moe is not None:
        sizes["number of experts"] = (config.moe.router.experts, layout.expert)
        sizes["width of the shared experts"] = (config.moe.shared_size, layout.tensor)
    wrong = [f"{name} {size} into {ranks}" for name, (size, ranks) in sizes.items() if size % ranks]
    if wrong:
        raise ModelError(f"{layout} does not divide {', '.join(wrong)}: choose another layout")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, types and bytes: NaN equals itself and 0 does not equal -0."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
