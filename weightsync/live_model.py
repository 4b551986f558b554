"""Models of this process as ends of a transfer: what `WeightSource` and `WeightReceiver` need of them.

layout, buffers = block_layout(*policy.weight_blocks())        # the trainer's side: its own parameters
engine = LiveModel(model, pause=..., run=..., resume=...)      # the engine's side: fused parameters
WeightReceiver(address, token, engine.layout, 0, IpcTarget(), engine)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Box, Layout, Piece, Rank, Tensor, full
from zerokl.weightsync.messages import InFlight
from zerokl.weightsync.sglang_loader import live_parts
from zerokl.weightsync.transports.base import Buffers

Block = tuple[str, int, int, int, int, str, int]
"""Rows [top, bottom) and columns [left, right) of a tensor, in the rows of a parameter: tensor, top, bottom, left,
right, parameter, first of its rows. Matrices have the first dimension as rows; a block fills the parameter's rows."""

_DEVICES = ("cpu", "cuda")


def named_layout(tensors: Mapping[str, torch.Tensor]) -> tuple[Layout, dict[str, torch.Tensor]]:
    """One rank that holds whole tensors under their Hugging Face names: its layout, and its buffers.

    Buffers of contiguous CPU tensors are views, others are copies.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    blocks = []
    for name, tensor in whole.items():
        columns = math.prod(tensor.shape[1:])
        blocks.append((name, 0, tensor.numel() // columns, 0, columns, name, 0))
    return block_layout(whole, whole, blocks)


def block_layout(
    parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], blocks: Iterable[Block]
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """One rank that holds ``blocks`` of the model's ``tensors`` (which may be without memory) in its ``parameters``
    (contiguous, on the CPU or a GPU). Returns its layout, and its buffers, which are views.

    Raises WeightSyncError for a parameter that is not contiguous, on the CPU or a GPU.
    """
    described = {name: Tensor(name, tuple(tensor.shape), _dtype(tensor)) for name, tensor in tensors.items()}
    pieces = []
    for name, top, bottom, left, right, parameter, row in blocks:
        pitch = (right - left) * described[name].item_bytes
        pieces.append(Piece(name, Box(top, bottom, left, right), parameter, row * pitch, pitch))
    buffers = {name: as_bytes(parameter) for name, parameter in parameters.items()}
    rank = Rank({name: buffer.numel() for name, buffer in buffers.items()}, tuple(pieces))
    return Layout(tuple(described.values()), (rank,)), buffers


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, uint8 [n], as a view. Raises WeightSyncError unless it is contiguous, on the CPU or a GPU."""
    if not tensor.is_contiguous() or tensor.device.type not in _DEVICES:
        raise WeightSyncError(f"need a contiguous CPU or CUDA tensor, got {tuple(tensor.shape)} on {tensor.device}")
    return tensor.detach().view(-1).view(torch.uint8)


class LiveModel:
    """An `Engine` that swaps the memory under a model's parameters, on the CPU or on one GPU (``device``); nothing is
    copied. Captured CUDA graphs would go on reading the old memory: the engine must run without them. Has not run on a
    GPU. Raises WeightSyncError for parameters on several devices, or on another kind.

    ``pause`` and ``resume`` stop and start the answering of requests; ``run`` calls what it is given where no step of
    the engine runs, with whatever the engine needs before and after a change of its weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        pause: Callable[[InFlight], None],
        run: Callable[[Callable[[], None]], None],
        resume: Callable[[str], None],
    ) -> None:
        self._parameters = dict(model.named_parameters())  # lists a shared parameter once
        self._first = {name: parameter.data for name, parameter in self._parameters.items()}
        self.device = _one_device(self._first.values())
        self.pause, self._run, self._resume = pause, run, resume
        self.layout = _live_layout(model, self._parameters)

    def install(self, version: str, buffers: Buffers) -> None:  # noqa: ARG002
        self._run(lambda: self._swap(buffers))

    def restore(self, version: str | None, buffers: Buffers) -> None:
        if version is not None:
            self.install(version, buffers)
        elif self._first:  # no version yet: what the model was loaded with
            self._run(lambda: self._swap(self._first))

    def resume(self, version: str) -> None:
        self._first = {}  # never asked for again once a version is live
        self._resume(version)

    def _swap(self, memory: Mapping[str, torch.Tensor]) -> None:
        if {memory[name].device for name in self._parameters} != {self.device}:  # asked before anything is swapped
            found = ", ".join(sorted({str(memory[name].device) for name in self._parameters}))
            raise WeightSyncError(
                f"the new weights lie on {found}, the model is on {self.device}: a GPU's arrive there by cuda_ipc, "
                "collective or rdma, those in host memory by any transport but cuda_ipc"
            )
        for name, parameter in self._parameters.items():
            parameter.data = memory[name].view(parameter.dtype).view(parameter.shape)


def _one_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    found = {tensor.device for tensor in tensors}
    if len(found) != 1 or next(iter(found)).type not in _DEVICES:
        names = ", ".join(sorted(map(str, found)))
        raise WeightSyncError(f"weights are received into CPU memory or one GPU's; the model is on {names}")
    return found.pop()


def _live_layout(model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter]) -> Layout:
    """Which part of which parameter holds which Hugging Face tensor. Rows that are padding belong to none."""
    tensors, pieces = [], []
    for name, parameter in parameters.items():
        for part, data in live_parts(model, name, parameter):
            described = Tensor(part, tuple(data.shape), _dtype(data))
            pitch = described.columns * described.item_bytes
            tensors.append(described)
            offset = data.data_ptr() - parameter.data.data_ptr()
            pieces.append(Piece(part, full(described), name, offset, pitch))
    sizes = {name: parameter.data.nbytes for name, parameter in parameters.items()}
    return Layout(tuple(tensors), (Rank(sizes, tuple(pieces)),))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
