"""Cuts a whole model's parameters into what one rank holds, by the attributes that Megatron's layers set on theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from zerokl.alignment.megatron.core import parallel_state
from zerokl.alignment.megatron.modules import ScoringModel

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def whole_names(chunk: ScoringModel) -> Iterator[tuple[str, str]]:
    """(name in this chunk, name in the whole model) of every parameter and of what belongs to the model untrained:
    the routers' selection biases."""
    names = [name for name, _ in chunk.named_parameters()]
    names += [name for name, _ in chunk.named_buffers() if name.endswith(".expert_bias")]
    for name in names:
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        whole = ".".join(parts)
        yield name, _EMBEDDING if whole == _HEAD and chunk.share_embeddings_and_output_weights else whole


def shard(whole: Mapping[str, torch.Tensor], chunk: ScoringModel) -> dict[str, torch.Tensor]:
    """This rank's part of a whole model's tensors, under the chunk's own names."""
    own = dict(chunk.named_parameters()) | dict(chunk.named_buffers())
    return {name: _part(whole[full], own[name]) for name, full in whole_names(chunk)}


def _part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not getattr(parameter, "allreduce", True):  # experts
        return whole.chunk(parallel_state.get_expert_model_parallel_world_size())[
            parallel_state.get_expert_model_parallel_rank()
        ]
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    # a stride of 2: gate rows and up rows, each shared by all ranks
    dim, stride = getattr(parameter, "partition_dim"), getattr(parameter, "partition_stride")  # noqa: B009  (Megatron's)
    return torch.cat([block.chunk(ranks, dim)[rank] for block in whole.chunk(stride, dim)], dim)
