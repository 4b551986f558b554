"""Batch-invariant kernels with one arithmetic on every backend (see CONTRACT.md). Needs torch and nothing else."""

from .ops.activation import silu_and_mul
from .ops.attention import attention_paged, attention_varlen
from .ops.collective import tree_all_reduce
from .ops.linear import embedding, linear
from .ops.logprob import SelectedLogprob, logprob_from_logits, selected_logprob, vocabulary_share
from .ops.moe import Groups, Permutation, Routing, grouped_linear, moe_combine, moe_permute, router_topk
from .ops.norm import rms_norm
from .ops.rotary import rotary, rotary_table
from .ops.sampling import Sampled, sample

__all__ = [
    "Groups",
    "Permutation",
    "Routing",
    "Sampled",
    "SelectedLogprob",
    "attention_paged",
    "attention_varlen",
    "embedding",
    "grouped_linear",
    "linear",
    "logprob_from_logits",
    "moe_combine",
    "moe_permute",
    "rms_norm",
    "rotary",
    "rotary_table",
    "router_topk",
    "sample",
    "selected_logprob",
    "silu_and_mul",
    "tree_all_reduce",
    "vocabulary_share",
]
