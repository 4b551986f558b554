"""The process group and Megatron's parallel state: one rank, reached over nothing."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from zerokl.alignment.megatron.core import model_parallel_cuda_manual_seed, parallel_state

_TIMEOUT = timedelta(seconds=120)


def initialise() -> None:
    """Bring up torch.distributed and Megatron's groups for one rank; does nothing if they are up.

    An in-process store serves the rendezvous: no port is opened. Raises RuntimeError if torch.distributed already runs
    with more than one rank.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    if dist.get_world_size() != 1:
        raise RuntimeError(
            f"the Megatron binding runs on one rank, but torch.distributed has {dist.get_world_size()}; "
            "start a single process"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        # activation recomputation saves and restores these random states, although nothing here draws from them
        model_parallel_cuda_manual_seed(1)
