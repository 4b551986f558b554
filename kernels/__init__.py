"""Batch-invariant kernels with one arithmetic on every backend (see CONTRACT.md). Needs torch and nothing else."""

from .ops.accelerators import accelerate, accelerators
from .ops.activation import silu_and_mul
from .ops.attention import attention_paged, attention_varlen
from .ops.collective import tree_all_reduce
from .ops.column_linear import column_linear
from .ops.linear import embedding, linear
from .ops.logprob import SelectedLogprob, logprob_from_logits, selected_logprob, vocabulary_share
from .ops.moe import Groups, Permutation, Routing, grouped_linear, moe_combine, moe_permute, router_topk
from .ops.norm import rms_norm
from .ops.quantize import (
    Fp8Block,
    Int4Group,
    Mxfp8,
    dequantize_fp8_block,
    dequantize_int4_group,
    dequantize_mxfp8,
    fake_quantize_fp8_block,
    fake_quantize_int4_group,
    fake_quantize_mxfp8,
    quantize_fp8_block,
    quantize_int4_group,
    quantize_mxfp8,
)
from .ops.quantized_linear import fp8_linear, int4_linear, mxfp8_linear
from .ops.rotary import rotary, rotary_table
from .ops.sampling import Sampled, sample
from .ops.scale_layout import from_blackwell_scales, from_hopper_scales, to_blackwell_scales, to_hopper_scales
from .ops.tensor_core import matrix_step

__all__ = [
    "Fp8Block",
    "Groups",
    "Int4Group",
    "Mxfp8",
    "Permutation",
    "Routing",
    "Sampled",
    "SelectedLogprob",
    "accelerate",
    "accelerators",
    "attention_paged",
    "attention_varlen",
    "column_linear",
    "dequantize_fp8_block",
    "dequantize_int4_group",
    "dequantize_mxfp8",
    "embedding",
    "fake_quantize_fp8_block",
    "fake_quantize_int4_group",
    "fake_quantize_mxfp8",
    "fp8_linear",
    "from_blackwell_scales",
    "from_hopper_scales",
    "grouped_linear",
    "int4_linear",
    "linear",
    "logprob_from_logits",
    "matrix_step",
    "moe_combine",
    "moe_permute",
    "mxfp8_linear",
    "quantize_fp8_block",
    "quantize_int4_group",
    "quantize_mxfp8",
    "rms_norm",
    "rotary",
    "rotary_table",
    "router_topk",
    "sample",
    "selected_logprob",
    "silu_and_mul",
    "to_blackwell_scales",
    "to_hopper_scales",
    "tree_all_reduce",
    "vocabulary_share",
]
