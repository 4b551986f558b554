"""The layer specification: which module stands where in a Megatron GPTModel, and the model built from it."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from zerokl import kernels
from zerokl.alignment.megatron.core import (
    MLP,
    AttnMaskType,
    GPTModel,
    MLPSubmodules,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_gpt_decoder_block_spec,
)
from zerokl.alignment.megatron.layout import Layout, LayoutError
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.modules import (
    ColumnLinear,
    CoreAttention,
    RMSNorm,
    RowLinear,
    ScoringModel,
    SwiGLU,
    residual_add,
)
from zerokl.alignment.megatron.moe import MoE, MoELayer, MoeTransformerConfig
from zerokl.alignment.megatron.stock_moe import moe_options


def transformer_config(
    model: ModelConfig, layout: Layout, *, stock: bool = False, recompute: bool = False
) -> TransformerConfig:
    """Megatron's configuration for a bf16 model in one layout."""
    options = _layout_options(layout)
    if recompute:
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cuda_graph_scope.*")  # about a default that nobody set
        if stock:
            return TransformerConfig(**_transformer_options(model, stock), **options, **moe_options(model))
        if model.moe is not None:
            return MoeTransformerConfig(
                **_transformer_options(model, stock),
                **options,
                moe=model.moe,
                segments=layout.segments,
                shared_experts=_mlp(layout),
            )
        return TransformerConfig(**_transformer_options(model, stock), **options)


def _layout_options(layout: Layout) -> dict[str, Any]:
    options: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence_parallel,
        # losses and gradients are summed as they are; Megatron would divide both by the numbers of ranks and batches
        "calculate_per_token_loss": True,
    }
    if layout.pipeline > 1:
        # micro-batches differ in tokens; Megatron asks for the dispatcher even where there are no experts
        options |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    if layout.virtual_pipeline > 1:
        # Megatron's default exchange of virtual stages is silently wrong over gloo
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        options["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
    return options


def _transformer_options(model: ModelConfig, stock: bool) -> dict[str, Any]:
    return dict(  # noqa: C408  (keywords, as in Megatron's own signature)
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=model.qk_norm,
        add_qkv_bias=model.qkv_bias,
        rotary_interleaved=model.interleaved_rotary,
        gated_linear_unit=True,
        activation_func=F.silu,
        # the slot Megatron keeps for Transformer Engine's activation takes our own
        use_te_activation_func=not stock,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        # every weight is loaded; one that is not would poison all results instead of passing for a random one
        init_method=_fill_with_nan,
        output_layer_init_method=_fill_with_nan,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _fill_with_nan(weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():  # Megatron's own router hands in the parameter itself
        return weight.fill_(float("nan"))


def layer_spec(model: ModelConfig, layout: Layout, rotary_table: torch.Tensor, *, sparse: bool) -> ModuleSpec:
    """One decoder layer on `zerokl.kernels`, with a dense MLP or with experts."""
    head_norm = RMSNorm if model.qk_norm else None
    column_linear, row_linear = _linears(layout)
    attention = SelfAttentionSubmodules(
        linear_qkv=column_linear,
        core_attention=partial(CoreAttention, rotary_table=rotary_table),
        linear_proj=row_linear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    mlp = ModuleSpec(module=MLP, params={"ffn_hidden_size": model.intermediate_size}, submodules=_mlp(layout))
    return ModuleSpec(
        module=MoELayer if sparse else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=MoE if sparse else mlp,
            mlp_bda=residual_add,
        ),
    )


def _mlp(layout: Layout) -> MLPSubmodules:
    column_linear, row_linear = _linears(layout)
    return MLPSubmodules(linear_fc1=column_linear, activation_func=SwiGLU, linear_fc2=row_linear)


def _linears(layout: Layout) -> tuple[ModuleSpec, ModuleSpec]:
    """Column-parallel and row-parallel."""
    params = {"segments": layout.segments}
    return ModuleSpec(module=ColumnLinear, params=params), ModuleSpec(module=RowLinear, params=params)


def build_model(model: ModelConfig, layout: Layout, *, recompute: bool = False) -> list[ScoringModel]:
    """This rank's chunks of the model (one without virtual stages), with unset (NaN) weights.

    Megatron's process groups must exist in this layout. Raises LayoutError for a model that does not divide so.
    """
    layout.check(model)
    table = kernels.rotary_table(model.max_position_embeddings, model.rotary_dim, model.rope_theta)
    config = transformer_config(model, layout, recompute=recompute)
    chunks = []
    for virtual, place in enumerate(layout.places(dist.get_rank(), dist.get_world_size())):
        layers = [
            layer_spec(model, layout, table, sparse=model.moe_at(index) is not None)
            for index in layout.layers(place, model)
        ]
        last = place.stage == layout.stages - 1
        chunks.append(
            ScoringModel(
                config=config,
                transformer_layer_spec=TransformerBlockSubmodules(
                    layer_specs=layers, layer_norm=RMSNorm if last else None
                ),
                position_embedding_type="none",
                pre_process=place.stage == 0,
                post_process=last,
                vp_stage=virtual if layout.virtual_pipeline > 1 else None,
                **_gpt_arguments(model),
            )
        )
    return chunks


def build_stock_model(model: ModelConfig, layout: Layout, *, recompute: bool = False) -> GPTModel:
    """Megatron's own local layers with its own arithmetic: the control measurement and speed baseline."""
    if layout.shards_weights:
        raise LayoutError("stock layers run on one rank only; use a layout of one rank")
    config = transformer_config(model, layout, stock=True, recompute=recompute)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm"
        ),
        position_embedding_type="rope",
        rotary_percent=model.rotary_dim / model.head_dim,
        rotary_base=model.rope_theta,
        **_gpt_arguments(model),
    )
    gpt.bfloat16()  # torch's RMSNorm ignores params_dtype; Megatron's own training does the same
    for name, buffer in gpt.named_buffers():
        if name.endswith(".expert_bias"):
            buffer.data = buffer.data.float()  # and keeps these in fp32, but only from the first forward on
    return gpt


def _gpt_arguments(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "share_embeddings_and_output_weights": model.tie_word_embeddings,
    }
