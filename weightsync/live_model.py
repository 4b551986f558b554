"""Models of this process as ends of a transfer: what `WeightSource` and `WeightReceiver` need of them.

layout, buffers = named_layout(dict(policy.named_weights()))   # the trainer's side, whole tensors
engine = LiveModel(model, pause=..., flush=..., resume=...)    # the engine's side, fused parameters
WeightReceiver(address, token, engine.layout, 0, IpcTarget(), engine)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from zerokl.weightsync.layout import Layout, Piece, Rank, RankBuilder, Tensor, full
from zerokl.weightsync.sglang_loader import live_parts
from zerokl.weightsync.transports.base import Buffers


def named_layout(tensors: Mapping[str, torch.Tensor]) -> tuple[Layout, dict[str, torch.Tensor]]:
    """One rank that holds whole tensors under their Hugging Face names: its layout, and its buffers.

    Buffers of contiguous CPU tensors are views, others are copies.
    """
    described = {name: _describe(name, tensor) for name, tensor in tensors.items()}
    built = RankBuilder(described)
    for name in described:
        built.whole(name, name)
    return Layout(tuple(described.values()), (built.build(),)), {n: as_bytes(t) for n, t in tensors.items()}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, uint8 [n]: a view if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


class LiveModel:
    """An `Engine` that swaps the memory under a model's parameters; nothing is copied.

    ``pause`` and ``resume`` stop and start the answering of requests; ``flush`` drops what was cached under other
    weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        pause: Callable[[], None],
        flush: Callable[[], None],
        resume: Callable[[str], None],
    ) -> None:
        self._parameters = dict(model.named_parameters())  # lists a shared parameter once
        self._first = {name: parameter.data for name, parameter in self._parameters.items()}
        self.pause, self._flush, self._resume = pause, flush, resume
        self.layout = _live_layout(model, self._parameters)

    def install(self, version: str, buffers: Buffers) -> None:  # noqa: ARG002
        for name, parameter in self._parameters.items():
            parameter.data = buffers[name].view(parameter.dtype).view(parameter.shape)
        self._flush()

    def restore(self, version: str | None, buffers: Buffers) -> None:
        if version is not None:
            self.install(version, buffers)
            return
        for name, parameter in self._parameters.items():  # no version yet: what the model was loaded with
            parameter.data = self._first[name]
        self._flush()

    def resume(self, version: str) -> None:
        self._first = {}  # never asked for again once a version is live
        self._resume(version)


def _live_layout(model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter]) -> Layout:
    """Which part of which parameter holds which Hugging Face tensor. Rows that are padding belong to none."""
    tensors, pieces = [], []
    for name, parameter in parameters.items():
        for part, data in live_parts(model, name, parameter):
            described = _describe(part, data)
            pitch = described.columns * described.item_bytes
            tensors.append(described)
            offset = data.data_ptr() - parameter.data.data_ptr()
            pieces.append(Piece(part, full(described), name, offset, pitch))
    sizes = {name: parameter.data.nbytes for name, parameter in parameters.items()}
    return Layout(tuple(tensors), (Rank(sizes, tuple(pieces)),))


def _describe(name: str, tensor: torch.Tensor) -> Tensor:
    return Tensor(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
