"""Micro-batches through the stages of a pipeline, by Megatron's own schedules (1F1B, interleaved virtual stages)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from zerokl.alignment.megatron.core import get_forward_backward_func, parallel_state
from zerokl.alignment.megatron.layout import LayoutError
from zerokl.alignment.routing_replay import Replay
from zerokl.alignment.types import LossFunction, PackedBatch


def run(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    replays: Sequence[Replay | None],
    loss_fn: LossFunction | None,
) -> list[torch.Tensor]:
    """Forward, and with a ``loss_fn(logprobs, index)`` backward, of every micro-batch, gradients added in their order.

    ``replays``: the experts that each follows, if any.
    Returns per micro-batch the log-probabilities fp32 [n], detached, on every stage's ranks. Raises LayoutError for
    fewer micro-batches than virtual stages need.
    """
    wanted = len(batches)
    if len(chunks) > 1:  # Megatron's interleaved schedule needs as many micro-batches as stages
        missing = parallel_state.get_pipeline_model_parallel_world_size() - wanted
        if missing > 0 and loss_fn is not None:
            raise LayoutError(
                f"{wanted} micro-batches under virtual_pipeline; supported: at least one a pipeline stage"
            )
        batches = [*batches, *[batches[-1]] * missing]
        replays = [*replays, *[None] * missing]
    scored = [torch.empty(batch.targets.shape, device=batch.tokens.device) for batch in batches]

    def forward(iterator: Iterator[int], chunk: Any) -> tuple[torch.Tensor, Any]:
        index = next(iterator)

        def loss(logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            scored[index] = logprobs.detach()
            value = logprobs.detach().sum() if loss_fn is None else loss_fn(logprobs, index)
            return value, torch.ones((), dtype=torch.int, device=value.device), {}

        return chunk(batches[index], replays[index]), loss

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(range(len(batches))) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=0,  # shapes travel with the tensors
        micro_batch_size=1,
        forward_only=loss_fn is None,
    )
    group, last = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
    )
    for logprobs in scored:
        dist.broadcast(logprobs, last, group=group)
    return scored[:wanted]
