"""Recording SGLang's forward passes for `alignment.trace`: prefill chunks and decode steps of one request at a time."""

from __future__ import annotations

import functools
from typing import Any

import torch

from zerokl.alignment.recorder import Modules, Plant, Recorder
from zerokl.alignment.sglang.errors import UnsupportedError


class Tracer:
    """Stands around the model's and the sampler's forward of one engine; records once `start` named a folder."""

    def __init__(self, runner: Any) -> None:
        self._modules = Modules(runner.model).__enter__()  # for the engine's life
        self._recorder: Recorder | None = None
        runner.model.forward = self._around_model(runner.model.forward)
        runner.sampler.forward = self._around_sampler(runner.sampler.forward)

    def start(self, folder: str, plant: dict[str, Any] | None) -> None:
        """Record every forward pass from now on into ``folder``; ``plant``: the fields of a `Plant`."""
        self._recorder = Recorder(folder, self._modules, plant=None if plant is None else Plant(**plant))

    def _around_model(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def recorded(input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **named: Any) -> Any:
            if self._recorder is None:
                return forward(input_ids, positions, forward_batch, **named)
            if forward_batch.batch_size != 1:
                raise UnsupportedError(f"a trace takes one request at a time, got {forward_batch.batch_size}")
            self._recorder.begin(positions, positions[-1:])
            with self._recorder:
                return forward(input_ids, positions, forward_batch, **named)

        return recorded

    def _around_sampler(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def recorded(*args: Any, **named: Any) -> Any:
            if self._recorder is None:
                return forward(*args, **named)
            with self._recorder:
                sampled = forward(*args, **named)
            self._recorder.finish()  # before the answer leaves this process
            return sampled

        return recorded


def attach(runner: Any) -> None:
    """Give a bound engine its tracer; ``start`` of the weight loader's side reaches it through the model."""
    runner.model.zerokl_tracer = Tracer(runner)
