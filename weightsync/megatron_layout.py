"""The trainer's side: which rank of Megatron-Core holds what, with its own parameter names.

``linear_qkv`` holds, for each key-value head in turn, its query heads, its key head and its value head; ``linear_fc1``
the rank's gate rows and then its up rows. Ranks count as Megatron's default order does: tensor-parallel rank fastest,
then expert or data parallel, pipeline stage slowest.
"""

from __future__ import annotations

from dataclasses import dataclass

from zerokl.weightsync.layout import (
    Box,
    Layout,
    LayoutError,
    Rank,
    RankBuilder,
    Tensor,
    column_share,
    even,
    row_share,
    vocabulary_share,
)
from zerokl.weightsync.model_shape import CHOICE_BIAS, EMBEDDING, FINAL_NORM, HEAD, ModelShape, layer

_NORMS = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
_QK_NORMS = {"self_attn.q_norm": "self_attention.q_layernorm", "self_attn.k_norm": "self_attention.k_layernorm"}


@dataclass(frozen=True)
class MegatronSizes:
    """Parallel sizes: ``tp * dp * pp`` ranks; experts are spread over ``etp * ep`` of each stage's ``tp * dp``.

    Context-parallel ranks hold what data-parallel ones do: both count as ``dp``.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    etp: int = 1
    vocabulary_multiple: int = 1
    """The vocabulary is padded to a multiple of this (Megatron's make_vocab_size_divisible_by times tp)."""
    last_stage: int = 0
    """Layers of the last stage (0: as many as the others have); Megatron's num_layers_in_last_pipeline_stage."""


def megatron_layout(model: ModelShape, sizes: MegatronSizes) -> Layout:
    """What every trainer rank holds. Raises LayoutError, naming the dimension, for a split that does not come out."""
    tensors = model.tensors()
    if model.latent is None and model.kv_heads < sizes.tp:
        raise LayoutError(f"{model.kv_heads} key-value heads cannot be split over {sizes.tp} tensor-parallel ranks")
    even(sizes.tp * sizes.dp, sizes.etp * sizes.ep, "the ranks of one pipeline stage")
    if sizes.last_stage and sizes.pp > 1:
        even(model.layers - sizes.last_stage, sizes.pp - 1, "the layers before the last stage")
    else:
        even(model.layers, sizes.pp, "the layers")
    ranks = [
        _rank(model, tensors, sizes, inner, stage) for stage in range(sizes.pp) for inner in range(sizes.tp * sizes.dp)
    ]
    return Layout(tuple(tensors.values()), tuple(ranks))


def _rank(model: ModelShape, tensors: dict[str, Tensor], sizes: MegatronSizes, inner: int, stage: int) -> Rank:
    built, tp = RankBuilder(tensors), inner % sizes.tp
    first, last = stage == 0, stage == sizes.pp - 1
    vocabulary = [EMBEDDING] if first else []
    if last:
        vocabulary += [HEAD] if not model.tied else [] if first else [EMBEDDING]  # tied: the last stage has a copy
    for name in vocabulary:
        box, rows = vocabulary_share(tensors[name], tp, sizes.tp, sizes.vocabulary_multiple)
        own = name == EMBEDDING and first
        built.stack("embedding.word_embeddings.weight" if own else "output_layer.weight", [(name, box)], rows=rows)
    for local, index in enumerate(_layers(model, sizes, stage)):
        hf, own_name = layer(index), f"decoder.layers.{local}."
        if model.latent is not None:
            _latent_attention(built, tensors, hf, own_name, tp, sizes.tp)
        else:
            _attention(built, model, tensors, hf, own_name, tp, sizes.tp)
        if model.sparse(index):
            _experts(built, model, tensors, sizes, hf, own_name, inner)
        else:
            _mlp(built, tensors, f"{hf}mlp.", f"{own_name}mlp.", tp, sizes.tp)
        for name, own_norm in (_NORMS | (_QK_NORMS if model.qk_norm else {})).items():
            built.whole(f"{own_name}{own_norm}.weight", f"{hf}{name}.weight")
    if last:
        built.whole("decoder.final_layernorm.weight", FINAL_NORM)
    return built.build()


def _layers(model: ModelShape, sizes: MegatronSizes, stage: int) -> range:
    """The layers of a pipeline stage."""
    if not sizes.last_stage or sizes.pp == 1:
        count = model.layers // sizes.pp
        return range(stage * count, (stage + 1) * count)
    count = (model.layers - sizes.last_stage) // (sizes.pp - 1)
    return range(stage * count, model.layers if stage == sizes.pp - 1 else (stage + 1) * count)


def _latent_attention(built: RankBuilder, tensors: dict[str, Tensor], hf: str, own: str, tp: int, ranks: int) -> None:
    """Multi-head latent attention: the narrow projections are whole on every rank, heads are split."""
    for name, own_name in (
        ("q_a_proj", "linear_q_down_proj"),
        ("q_a_layernorm", "q_layernorm"),
        ("kv_a_proj_with_mqa", "linear_kv_down_proj"),
        ("kv_a_layernorm", "kv_layernorm"),
    ):
        built.whole(f"{own}self_attention.{own_name}.weight", f"{hf}self_attn.{name}.weight")
    for name, own_name in (("q_b_proj", "linear_q_up_proj"), ("kv_b_proj", "linear_kv_up_proj")):
        tensor = tensors[f"{hf}self_attn.{name}.weight"]
        box = row_share(tensor, tp, ranks)
        built.stack(f"{own}self_attention.{own_name}.weight", [(tensor.name, box)])
    output = tensors[f"{hf}self_attn.o_proj.weight"]
    built.stack(f"{own}self_attention.linear_proj.weight", [(output.name, column_share(output, tp, ranks))])


def _attention(
    built: RankBuilder, model: ModelShape, tensors: dict[str, Tensor], hf: str, own: str, tp: int, ranks: int
) -> None:
    groups = even(model.kv_heads, ranks, "the key-value heads")
    per_group = even(model.heads, model.kv_heads, "the query heads") * model.head_dim
    rows = {"q": per_group, "k": model.head_dim, "v": model.head_dim}
    for leaf in ("weight", "bias") if model.qkv_bias else ("weight",):
        boxes = []
        for group in range(tp * groups, (tp + 1) * groups):
            for part, height in rows.items():
                name = f"{hf}self_attn.{part}_proj.{leaf}"
                boxes.append((name, Box(group * height, (group + 1) * height, 0, tensors[name].columns)))
        built.stack(f"{own}self_attention.linear_qkv.{leaf}", boxes)
    name = f"{hf}self_attn.o_proj.weight"
    built.stack(f"{own}self_attention.linear_proj.weight", [(name, column_share(tensors[name], tp, ranks))])


def _mlp(built: RankBuilder, tensors: dict[str, Tensor], hf: str, own: str, tp: int, ranks: int) -> None:
    fused = [f"{hf}{part}_proj.weight" for part in ("gate", "up")]
    built.stack(f"{own}linear_fc1.weight", [(name, row_share(tensors[name], tp, ranks)) for name in fused])
    down = f"{hf}down_proj.weight"
    built.stack(f"{own}linear_fc2.weight", [(down, column_share(tensors[down], tp, ranks))])


def _experts(
    built: RankBuilder,
    model: ModelShape,
    tensors: dict[str, Tensor],
    sizes: MegatronSizes,
    hf: str,
    own: str,
    inner: int,
) -> None:
    built.whole(f"{own}mlp.router.weight", f"{hf}mlp.gate.weight")
    if model.choice_bias:
        built.whole(f"{own}mlp.router.expert_bias", f"{hf}{CHOICE_BIAS}")
    if model.shared_ffn:
        _mlp(built, tensors, f"{hf}mlp.shared_experts.", f"{own}mlp.shared_experts.", inner % sizes.tp, sizes.tp)
    count = even(model.experts, sizes.ep, "the experts")
    etp, ep = inner % sizes.etp, inner // sizes.etp % sizes.ep
    for local in range(count):
        expert, name = f"{hf}mlp.experts.{ep * count + local}.", f"{own}mlp.experts.local_experts.{local}."
        _mlp(built, tensors, expert, name, etp, sizes.etp)
