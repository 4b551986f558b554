"""Every name of Megatron-Core that this binding uses, imported once and after the CPU rewrite.

Written for 0.16.1 (the newest for Python 3.11) and read against 0.19.2 (Python 3.12 and later).
"""

from __future__ import annotations

import warnings

from zerokl.alignment.megatron.cpu import enable_cpu

on_cpu = enable_cpu()

with warnings.catch_warnings():
    # It announces at length that Transformer Engine and Apex are absent; nothing here uses them.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    from megatron.core import jit

    if on_cpu:
        jit.disable_jit_fuser()  # before its users are imported: torch.compile takes a C++ compiler and half a minute

    import megatron.core.optimizer as optimizer_module
    from megatron.core import __version__, dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        vocab_parallel_cross_entropy,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

if not hasattr(moe_utils, "te_general_gemm"):
    # its router asks whether this is None, but without Transformer Engine 0.16.1 leaves the name undefined
    moe_utils.te_general_gemm = None

__all__ = [
    "MLP",
    "AttnMaskType",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "GPTModel",
    "MLPSubmodules",
    "MegatronModule",
    "ModuleSpec",
    "OptimizerConfig",
    "PackedSeqParams",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedTensor",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "__version__",
    "clip_grad_by_total_norm_fp32",
    "dist_checkpointing",
    "get_forward_backward_func",
    "get_gpt_decoder_block_spec",
    "get_megatron_optimizer",
    "model_parallel_cuda_manual_seed",
    "optimizer_module",
    "parallel_state",
    "vocab_parallel_cross_entropy",
]
