"""Rollout routing replay (R3): the experts each token went to in the rollout, used again in the training forward.

A *record* belongs to one sample: unsigned integers [tokens, sparse layers, top_k], the experts of every token the
engine fed forward (prompt and response without its last token) in slot order. It takes one byte a slot, or two beyond
256 experts. The turns of a conversation add theirs (`join`). The records of a micro-batch lie end to end in one *slab*,
as its tokens do, and a `Replay` hands the slab out layer by layer and counts that every layer took it exactly as often
as it ran.
(W. Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers", 2025.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from zerokl.alignment.routing import Router, RoutingError

Mode = Literal["off", "on", "check"]
"""off: the trainer routes by itself; on: it follows the rollout; check: on, and tokens it would route otherwise are
counted."""


def record_dtype(router: Router) -> np.dtype[Any]:
    """The smallest unsigned type that numbers the experts (little-endian)."""
    return np.dtype("u1" if router.experts <= 256 else "<u2")


def pack(captured: np.ndarray, router: Router, tokens: int, sample: str) -> np.ndarray:
    """A record from captured signed integers, either flat or [tokens, layers, top_k] over *all* layers of the model.

    Raises RoutingError naming the sample if the capture is not whole or names an expert that does not exist.
    """
    shape = (tokens, router.layers, router.top_k)
    if captured.size != int(np.prod(shape)):
        raise RoutingError(f"{sample}: {captured.size} expert indices were captured, {shape} are needed")
    sparse = captured.reshape(shape)[:, router.first_layer :]
    if sparse.size and (int(sparse.min()) < 0 or int(sparse.max()) >= router.experts):
        raise RoutingError(f"{sample}: captured experts lie outside 0 to {router.experts - 1}: some were not recorded")
    record = np.ascontiguousarray(sparse, dtype=record_dtype(router))
    check_record(record, router, tokens, sample)
    return record


def unpack(data: bytes, router: Router, tokens: int, sample: str) -> np.ndarray:
    """The record whose bytes are ``data``. Raises RoutingError naming the sample if they are not one."""
    dtype, shape = record_dtype(router), (tokens, router.sparse_layers, router.top_k)
    if len(data) != int(np.prod(shape)) * dtype.itemsize:
        raise RoutingError(f"{sample}: a routing record of {len(data)} bytes is not {dtype} {shape}")
    record = np.frombuffer(data, dtype).reshape(shape)
    check_record(record, router, tokens, sample)
    return record


def check_record(record: np.ndarray | None, router: Router, tokens: int, sample: str) -> None:
    """Raise RoutingError naming the sample if its record is missing, short, misshapen, or not ``top_k`` experts."""
    if record is None:
        raise RoutingError(f"{sample} has no routing record: sample with an engine that captures experts")
    shape = (tokens, router.sparse_layers, router.top_k)
    if record.shape != shape or record.dtype != record_dtype(router):
        raise RoutingError(
            f"{sample}: the routing record is {record.dtype} {record.shape}, needs {record_dtype(router)} {shape}"
        )
    if record.size and int(record.max()) >= router.experts:
        raise RoutingError(f"{sample}: the routing record names expert {record.max()} of {router.experts}")
    ordered = np.sort(record, axis=-1)
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise RoutingError(f"{sample}: the routing record names one expert twice for a token")


def join(records: Sequence[np.ndarray | None], lengths: Sequence[int], sample: str) -> np.ndarray | None:
    """The record of a conversation from those of its turns, each of which covers everything before it too; None if no
    turn has one. What two turns have both recorded stays as in the earlier one, which sampled from it.

    ``lengths``: the tokens fed forward in each turn. Raises RoutingError naming sample and turn where a record is
    missing or has another length.
    """
    if all(record is None for record in records):
        return None
    parts: list[np.ndarray] = []
    done = 0
    for turn, (record, length) in enumerate(zip(records, lengths, strict=True)):
        where = f"{sample}, turn {turn}" if len(records) > 1 else sample
        if record is None:
            raise RoutingError(f"{where} has no routing record, other turns have")
        if len(record) != length:
            raise RoutingError(f"{where}: a routing record of {len(record)} tokens for {length} tokens")
        parts.append(record[done:])
        done = length
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def slab(records: Sequence[np.ndarray | None], lengths: Sequence[int]) -> torch.Tensor | None:
    """The records of a micro-batch end to end, [T, layers, top_k]; None if no sample has one.

    ``lengths`` are the samples' token counts. Raises RoutingError naming the sample whose record is missing, has
    another length or another shape than the first.
    """
    if all(record is None for record in records):
        return None
    parts = []
    for index, (record, length) in enumerate(zip(records, lengths, strict=True)):
        if record is None:
            raise RoutingError(f"sample {index} has no routing record, others of its micro-batch have")
        if len(record) != length:
            raise RoutingError(f"sample {index}: a routing record of {len(record)} tokens for {length} tokens")
        parts.append(record)
        if record.shape[1:] != parts[0].shape[1:] or record.dtype != parts[0].dtype:
            raise RoutingError(
                f"sample {index}: its routing record is {record.dtype} {record.shape[1:]} a token, the first one's "
                f"{parts[0].dtype} {parts[0].shape[1:]}"
            )
    return torch.from_numpy(np.concatenate(parts))


class Replay:
    """One micro-batch's slab while its forward, and recomputation in the backward, run on one rank."""

    def __init__(
        self,
        slab: torch.Tensor | None,
        router: Router,
        tokens: int,
        *,
        check: bool,
        layers: Iterable[int] | None = None,
        own: slice | None = None,
    ) -> None:
        """``layers``: those of the model that run on this rank (None: all); ``own``: the tokens that it routes.

        Raises RoutingError if the slab is missing or does not fit the model and the micro-batch.
        """
        if slab is None:
            raise RoutingError("the micro-batch has no routing records: sample with an engine that captures experts")
        shape = (tokens, router.sparse_layers, router.top_k)
        if tuple(slab.shape) != shape:
            raise RoutingError(f"the micro-batch's routing records are {tuple(slab.shape)}, needs {shape}")
        self.check = check
        self._own = slice(0, tokens) if own is None else own
        self._slab = slab[self._own]
        self._first_layer = router.first_layer
        held = range(router.layers) if layers is None else layers
        self._taken = dict.fromkeys((layer for layer in held if layer >= router.first_layer), 0)
        self._differs = torch.zeros(tokens, dtype=torch.bool, device=slab.device)

    def take(self, layer: int) -> torch.Tensor:
        """int64 [own tokens, top_k]: the experts of ``layer`` (from 0, dense ones counted), for one pass over it.

        Raises RoutingError for a layer that this rank does not hold.
        """
        if layer not in self._taken:
            raise RoutingError(f"layer {layer} asks for routing records, this rank holds {sorted(self._taken)}")
        self._taken[layer] += 1
        return self._slab[:, layer - self._first_layer].to(torch.int64)

    def compare(self, layer: int, live: torch.Tensor) -> None:
        """Note the tokens whose ``live`` experts [own tokens, top_k] are others, or in other slots, than replayed."""
        replayed = self._slab[:, layer - self._first_layer].to(torch.int64)
        self._differs[self._own] |= (live != replayed).any(-1)

    @property
    def differs(self) -> torch.Tensor:
        """bool [tokens]: which of the micro-batch's tokens differed in any layer of this rank so far."""
        return self._differs

    @property
    def differing_tokens(self) -> int:
        """How many those are."""
        return int(self._differs.sum())

    def finish(self, passes: int) -> None:
        """Raise RoutingError unless every layer of this rank took its records ``passes`` times (2 with recomputation,
        else 1)."""
        for layer, taken in self._taken.items():
            if taken != passes:
                raise RoutingError(f"layer {layer} took its routing records {taken} times, {passes} expected")
