"""Weights that arrive while the engine runs: the receiving end of a transfer, put into the scheduler's process."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.runtime_context import get_parallel

from zerokl.alignment.sglang.config import TRANSFER_KEY, Transfer
from zerokl.alignment.sglang.errors import UnsupportedError
from zerokl.alignment.sglang.gate import Gate


def attach(runner: Any) -> Callable[[], dict[str, Any]]:
    """Have the receiving end start with the scheduler's loop, if the engine was started with `EngineConfig.transfer`.

    Returns what reports its state. This is the one place that says which rank of the engine this process is. Raises
    UnsupportedError where CUDA graphs are captured: they would go on reading the memory of the old weights.
    """
    settings = getattr(runner.model.config, TRANSFER_KEY, None)
    if settings is None:
        return dict
    if any(parameter.is_cuda for parameter in runner.model.parameters()) and not cuda_graph_fully_disabled():
        raise UnsupportedError("transfer: CUDA graphs would keep the old weights; set disable_cuda_graph (SGLang)")
    transfer = Transfer(**settings)
    state: list[Callable[[], dict[str, Any]]] = [lambda: {"state": "starting", "version": None}]

    def started(gate: Gate) -> None:
        start, parallel = pkgutil.resolve_name(transfer.receiver), get_parallel()
        path = runner.model_config.model_path
        state[0] = start(runner.model, path, gate, parallel.tp_rank, parallel.tp_size, asdict(transfer))

    Gate(started).install()
    return lambda: {"weights": state[0]()}
