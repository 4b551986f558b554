"""The receiving end in SGLang's scheduler process: `start` is called there by name when the scheduler's loop begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from zerokl.weightsync.ends import Site, target_ends
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Layout
from zerokl.weightsync.live_model import LiveModel
from zerokl.weightsync.members import WeightReceiver
from zerokl.weightsync.messages import InFlight
from zerokl.weightsync.model_shape import read_shape
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.wire import read_token


class Stop(Protocol):
    """How an engine is stopped and started (`alignment.sglang.gate.Gate`)."""

    def pause(self, in_flight: InFlight) -> None: ...

    def run(self, action: Callable[[], None]) -> None: ...

    def resume(self, version: str) -> None: ...


def start(
    model: torch.nn.Module, model_path: str, gate: Stop, rank: int, size: int, settings: Mapping[str, Any]
) -> Callable[[], dict[str, str | None]]:
    """Join the transfers as tensor-parallel rank ``rank`` of ``size`` of engine number ``settings["engine"]``.

    Returns what tells the receiver's state, and the version it may serve. Raises WeightSyncError for a token file that
    others may read, or a model whose layout is not known.
    """
    live = LiveModel(model, pause=gate.pause, run=gate.run, resume=gate.resume)
    engine, folder = int(settings["engine"]), Path(settings["address"]).parent
    layout = _layout(live, model_path, size)
    receiver = WeightReceiver(
        Path(settings["address"]),
        read_token(Path(settings["token_file"])),
        Layout(layout.tensors, layout.ranks * (engine + 1)),
        engine * size + rank,
        target_ends(Site(folder, tuple(settings["ranks"]), live.device, settings["interface"])),
        live,
    )
    receiver.start()
    return lambda: {"state": receiver.machine.state.value, "version": receiver.machine.version}


def _layout(live: LiveModel, model_path: str, size: int) -> Layout:
    """What every rank of one engine holds: of a whole engine as found, of a split one as SGLang splits it."""
    if size == 1:
        return live.layout
    layout = sglang_layout(read_shape(Path(model_path)), SglangSizes(tp=size))
    if not any(rank.buffers == live.layout.ranks[0].buffers for rank in layout.ranks):
        raise WeightSyncError(f"the engine's parameters are not those of {size} tensor-parallel ranks of {model_path}")
    return layout
