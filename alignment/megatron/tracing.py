"""Recording the training forward for `alignment.trace`."""

from __future__ import annotations

from pathlib import Path

import torch

from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.recorder import Modules, Plant, Recorder
from zerokl.alignment.types import PackedBatch


def record(policy: MegatronPolicy, batch: PackedBatch, folder: str | Path, plant: Plant | None = None) -> torch.Tensor:
    """Score a batch of one sequence and write every op's outputs into ``folder``; fp32 [n], the log-probabilities.

    Raises ValueError for several sequences, TraceError for an op that cannot be recorded.
    """
    if batch.cu_seqlens.numel() != 2:
        raise ValueError(f"a trace takes one sequence, got {batch.cu_seqlens.numel() - 1}")
    with Modules(policy.model) as modules:
        recorder = Recorder(folder, modules, columns={".linear_qkv": qkv_columns(policy.config)}, plant=plant)
        recorder.begin(batch.positions, batch.positions[batch.rows])
        with recorder:
            logprobs = policy.logprobs(batch)
        recorder.finish()
    return logprobs


def qkv_columns(config: ModelConfig) -> torch.Tensor:
    """int64: Megatron's columns of ``linear_qkv``, by key-value head, ordered all queries, all keys, all values."""
    head, groups = config.head_dim, config.num_key_value_heads
    queries = config.num_attention_heads // groups * head
    columns = torch.arange(groups * (queries + 2 * head)).view(groups, -1)
    return torch.cat([part.flatten() for part in columns.split([queries, head, head], dim=1)])
