"""The rollout's side: which rank of SGLang holds what, with its own parameter names.

``qkv_proj`` holds the rank's query heads, then its key heads, then its value heads (key-value heads repeat where there
are fewer than ranks); ``gate_up_proj`` its gate rows, then its up rows; ``w13_weight`` the same for each local expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerokl.weightsync.layout import (
    Box,
    Layout,
    Rank,
    RankBuilder,
    Tensor,
    column_share,
    even,
    full,
    row_share,
    vocabulary_share,
)
from zerokl.weightsync.model_shape import CHOICE_BIAS, EMBEDDING, FINAL_NORM, HEAD, ModelShape, layer

_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class SglangSizes:
    """``engines`` copies of ``tp`` ranks; experts are spread over ``ep`` of them, and split over the ``tp / ep``.

    ``mlp_tp``: over how many ranks a sparse model's dense layers and shared experts are split, 0 for all of them;
    SGLang's moe_dense_tp_size, and 1 for shared experts beside an all-to-all of tokens.
    """

    tp: int = 1
    ep: int = 1
    engines: int = 1
    mlp_tp: int = 0


def sglang_layout(model: ModelShape, sizes: SglangSizes) -> Layout:
    """What every engine rank holds. Raises LayoutError, naming the dimension, for a split that does not come out."""
    tensors = model.tensors()
    even(sizes.tp, sizes.ep, "the tensor-parallel ranks")
    even(sizes.tp, sizes.mlp_tp or 1, "the tensor-parallel ranks")
    engine = tuple(_rank(model, tensors, sizes, rank) for rank in range(sizes.tp))
    return Layout(tuple(tensors.values()), engine * sizes.engines)


def _rank(model: ModelShape, tensors: dict[str, Tensor], sizes: SglangSizes, rank: int) -> Rank:
    built = RankBuilder(tensors)
    for name in (EMBEDDING,) if model.tied else (EMBEDDING, HEAD):
        box, rows = vocabulary_share(tensors[name], rank, sizes.tp, _VOCABULARY_MULTIPLE)
        built.stack(name, [(name, box)], rows=rows)
    for index in range(model.layers):
        hf = layer(index)
        if model.latent is not None:
            _latent_attention(built, tensors, hf, rank, sizes.tp)
        else:
            _attention(built, model, tensors, hf, rank, sizes.tp)
        split = sizes.mlp_tp if model.experts and sizes.mlp_tp else sizes.tp
        if model.sparse(index):
            built.whole(f"{hf}mlp.gate.weight", f"{hf}mlp.gate.weight")
            if model.choice_bias:
                built.whole(f"{hf}{CHOICE_BIAS}", f"{hf}{CHOICE_BIAS}")
            if model.shared_ffn:
                _mlp(built, tensors, f"{hf}mlp.shared_experts.", rank % split, split)
            _experts(built, model, tensors, hf, rank, sizes)
        else:
            _mlp(built, tensors, f"{hf}mlp.", rank % split, split)
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if model.qk_norm else []
        for norm in norms:
            built.whole(f"{hf}{norm}.weight", f"{hf}{norm}.weight")
    built.whole(FINAL_NORM, FINAL_NORM)
    return built.build()


def _mlp(built: RankBuilder, tensors: dict[str, Tensor], mlp: str, part: int, parts: int) -> None:
    fused = [f"{mlp}{name}_proj.weight" for name in ("gate", "up")]
    built.stack(f"{mlp}gate_up_proj.weight", [(name, row_share(tensors[name], part, parts)) for name in fused])
    down = f"{mlp}down_proj.weight"
    built.stack(down, [(down, column_share(tensors[down], part, parts))])


def _latent_attention(built: RankBuilder, tensors: dict[str, Tensor], hf: str, rank: int, ranks: int) -> None:
    """Multi-head latent attention: the narrow projections fused and whole on every rank, heads split."""
    own = f"{hf}self_attn."
    narrow = [f"{own}{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    built.stack(f"{own}fused_qkv_a_proj_with_mqa.weight", [(name, full(tensors[name])) for name in narrow])
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        built.whole(f"{own}{name}.weight", f"{own}{name}.weight")
    for name, share in (("q_b_proj", row_share), ("kv_b_proj", row_share), ("o_proj", column_share)):
        weight = f"{own}{name}.weight"
        built.stack(weight, [(weight, share(tensors[weight], rank, ranks))])


def _attention(
    built: RankBuilder, model: ModelShape, tensors: dict[str, Tensor], hf: str, rank: int, ranks: int
) -> None:
    heads = even(model.heads, ranks, "the query heads")
    if model.kv_heads >= ranks:
        kv_heads = even(model.kv_heads, ranks, "the key-value heads")
        first = rank * kv_heads
    else:
        kv_heads, first = 1, rank // even(ranks, model.kv_heads, "the tensor-parallel ranks")
    shares = {"q": (rank * heads, heads), "k": (first, kv_heads), "v": (first, kv_heads)}
    for leaf in ("weight", "bias") if model.qkv_bias else ("weight",):
        boxes = []
        for part, (start, count) in shares.items():
            name, head = f"{hf}self_attn.{part}_proj.{leaf}", model.head_dim
            boxes.append((name, Box(start * head, (start + count) * head, 0, tensors[name].columns)))
        built.stack(f"{hf}self_attn.qkv_proj.{leaf}", boxes)
    name = f"{hf}self_attn.o_proj.weight"
    built.stack(name, [(name, column_share(tensors[name], rank, ranks))])


def _experts(
    built: RankBuilder, model: ModelShape, tensors: dict[str, Tensor], hf: str, rank: int, sizes: SglangSizes
) -> None:
    split, count = sizes.tp // sizes.ep, even(model.experts, sizes.ep, "the experts")
    ep, part = divmod(rank, split)
    experts = [f"{hf}mlp.experts.{e}." for e in range(ep * count, (ep + 1) * count)]
    fused = [f"{expert}{name}_proj.weight" for expert in experts for name in ("gate", "up")]
    built.stack(f"{hf}mlp.experts.w13_weight", [(name, row_share(tensors[name], part, split)) for name in fused])
    down = [f"{expert}down_proj.weight" for expert in experts]
    built.stack(f"{hf}mlp.experts.w2_weight", [(name, column_share(tensors[name], part, split)) for name in down])
