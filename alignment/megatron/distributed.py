"""The process group, Megatron's parallel state, and the sum of gradients over ranks in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from zerokl.alignment.megatron.core import model_parallel_cuda_manual_seed, parallel_state
from zerokl.alignment.megatron.layout import Layout
from zerokl.alignment.megatron.regions import tree_sum

_TIMEOUT = timedelta(seconds=120)


def connect(rank: int, world: int, rendezvous: Path, interface: str = "lo") -> None:
    """Bring up torch.distributed as ``rank`` of ``world`` processes; gloo listens on ``interface`` only.

    ``rendezvous``: a file that does not exist yet, in a folder of this user alone that all processes see.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = interface  # gloo reads it there only
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(str(rendezvous), world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)


def initialise(layout: Layout) -> None:
    """Bring up Megatron's groups for ``layout``, and torch.distributed for one rank if it does not run yet.

    More ranks are the caller's to start (`connect`, torchrun, or `init_process_group`). An in-process store serves a
    single rank's rendezvous: no port is opened. Raises LayoutError if the ranks do not divide into the layout,
    RuntimeError if Megatron's groups are up in another one (see `release`).
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    world = dist.get_world_size()
    layout.check_world(world)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=None if layout.virtual_pipeline == 1 else layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
        )
        # activation recomputation saves and restores these random states, although nothing here draws from them
        model_parallel_cuda_manual_seed(1)
    running = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if running != (layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.context, layout.expert):
        raise RuntimeError(
            f"Megatron's groups are up as tensor, pipeline, virtual, context, expert = {running}, not {layout}; "
            "call distributed.release() first"
        )


def release() -> None:
    """End Megatron's groups, so that the next policy may take another layout.

    Megatron itself only forgets them: their threads and connections would stay, and slow every later layout down.
    """
    for group in (parallel_state._global_process_group_list or [])[1:]:  # the first stands for the world
        torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def reduce_gradients(ddps: Sequence[Any]) -> None:
    """Sum main gradients over the ranks that computed parts of them, each sum as R2's tree, equal bits on all ranks.

    In this order: data-parallel ranks; tensor-parallel ranks, for replicated weights that saw a part of the tokens or
    heads; first and last stage, for tied embeddings. Megatron leaves the order to the communication library.
    """
    for ddp in ddps:
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            _sum_into(buffer.grad_data, buffer.data_parallel_group)
    tensor = parallel_state.get_tensor_model_parallel_group()
    for ddp in ddps:
        for name, parameter in ddp.module.named_parameters():
            per_head = "q_layernorm" in name or "k_layernorm" in name
            per_token = getattr(parameter, "sequence_parallel", False)
            if per_head or per_token:
                _sum_into(parameter.main_grad, tensor)
    for ddp in ddps:
        for parameter in ddp.parameters():
            if getattr(parameter, "shared_embedding", False):
                _sum_into(parameter.main_grad, parallel_state.get_embedding_group())


def own_tokens(tokens: int) -> slice:
    """Which of a micro-batch's ``tokens`` this rank routes: context-parallel ranks share them, then tensor-parallel
    ones."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    index = parallel_state.get_context_parallel_rank() * tensor + parallel_state.get_tensor_model_parallel_rank()
    size = tokens // (tensor * parallel_state.get_context_parallel_world_size())
    return slice(index * size, (index + 1) * size)


def on_any_rank(flags: torch.Tensor) -> torch.Tensor:
    """bool [n]: those set on any of the ranks that compute this micro-batch."""
    merged = flags.to(torch.uint8)
    for group in (parallel_state.get_model_parallel_group(), parallel_state.get_context_parallel_group()):
        if group.size() > 1:
            dist.all_reduce(merged, dist.ReduceOp.MAX, group=group)
    return merged.bool()


def from_last_stage(value: float) -> float:
    """The value that the pipeline's last stage computed, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    group, last = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
    )
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(box, last, group=group)
    return float(box)


def _sum_into(gradient: torch.Tensor, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        gradient.copy_(tree_sum(gradient, group))
