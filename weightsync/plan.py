"""Which bytes go from which rank to which: computed once, from both sides' layouts and nothing else.

Every byte a receiving rank holds is written exactly once, straight from a rank that holds it; no rank gathers a whole
tensor. Where several senders hold the same bytes the one with the least to do sends them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import xxhash

from zerokl.weightsync.layout import Box, Layout, LayoutError, Piece, Tensor, Typed

BATCH_BYTES = 1 << 20
"""A batch has at least this size, unless a pair of ranks exchanges less."""
COPY_BYTES = 32 << 20
"""Larger copies are split by rows: a transport that needs a staging buffer needs little more than this."""


class Copy(Typed, frozen=True, array_like=True):
    """``rows`` runs of ``row_bytes`` bytes of one tensor, ``pitch`` bytes apart on each side."""

    tensor: str
    source_buffer: str
    source_offset: int
    source_pitch: int
    target_buffer: str
    target_offset: int
    target_pitch: int
    rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


class Batch(Typed, frozen=True, array_like=True):
    """Copies that travel together from one sending to one receiving rank."""

    source: int
    target: int
    copies: tuple[Copy, ...]

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)


@dataclass(frozen=True)
class Plan:
    """All batches, by source and target. ``digest``: xxh3_128 of the batches, equal wherever the layouts are."""

    batches: tuple[Batch, ...]
    digest: str

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self.batches)

    def routes(self) -> dict[tuple[int, int], int]:
        """(source, target) -> bytes."""
        routes: dict[tuple[int, int], int] = {}
        for batch in self.batches:
            pair = batch.source, batch.target
            routes[pair] = routes.get(pair, 0) + batch.nbytes
        return routes

    def seconds(self, gb_per_s: float, *, shared: bool) -> float:
        """How long the bytes take: all of them over one ``shared`` medium, or the busiest rank's over its own link."""
        if shared:
            return self.nbytes / gb_per_s / 1e9
        load: dict[tuple[str, int], int] = {}
        for (source, target), size in self.routes().items():
            for end in (("out", source), ("in", target)):
                load[end] = load.get(end, 0) + size
        return max(load.values(), default=0) / gb_per_s / 1e9


@dataclass(frozen=True)
class _Holder:
    rank: int
    piece: Piece


def make_plan(sender: Layout, receiver: Layout) -> Plan:
    """The plan between two layouts. Raises LayoutError, naming rank and tensor, if a layout contradicts itself, the
    sides disagree about a tensor, or no sender holds what a receiver needs."""
    tensors, wanted = sender.check("sender"), receiver.check("receiver")
    for name in sorted(tensors.keys() | wanted.keys()):
        if tensors.get(name) != wanted.get(name):
            raise LayoutError(
                f"tensor {name!r}: the receiver expects {wanted.get(name)}, the sender has {tensors.get(name)}"
            )
    assigned = _balance(list(_needs(sender, receiver, tensors)))
    batches = tuple(batch for pair in sorted(assigned) for batch in _batches(*pair, assigned[pair]))
    return Plan(batches, xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(batches)))


def _needs(
    sender: Layout, receiver: Layout, tensors: dict[str, Tensor]
) -> Iterator[tuple[int, Piece, Box, list[_Holder], Tensor]]:
    """(target rank, its piece, box of at most COPY_BYTES, who holds that box, tensor), each needed byte once."""
    holders: dict[str, dict[Box, list[_Holder]]] = {}
    for rank, held in enumerate(sender.ranks):
        for piece in held.pieces:
            holders.setdefault(piece.tensor, {}).setdefault(piece.box, []).append(_Holder(rank, piece))
    for target, needed in enumerate(receiver.ranks):
        for piece in needed.pieces:
            tensor, missing = tensors[piece.tensor], [piece.box]
            for box, held_by in holders.get(piece.tensor, {}).items():
                rest = []
                for part in missing:
                    common = part.intersect(box)
                    if common is None:
                        rest.append(part)
                        continue
                    rest += part.without(common)
                    for small in _split(common, tensor.item_bytes):
                        yield target, piece, small, held_by, tensor
                missing = rest
            if missing:
                raise LayoutError(f"receiver rank {target} needs {missing[0]} of {piece.tensor!r}; no sender has it")


def _split(box: Box, item_bytes: int) -> Iterator[Box]:
    height = max(1, COPY_BYTES // ((box.right - box.left) * item_bytes))
    for top in range(box.top, box.bottom, height):
        yield Box(top, min(top + height, box.bottom), box.left, box.right)


def _balance(
    needs: list[tuple[int, Piece, Box, list[_Holder], Tensor]],
) -> dict[tuple[int, int], list[Copy]]:
    """The copies of each pair of ranks: a need, largest first, goes to the holder with the fewest bytes so far."""
    load: dict[int, int] = {}
    chosen: dict[int, _Holder] = {}
    size = [box.elements * tensor.item_bytes for _, _, box, _, tensor in needs]
    for index in sorted(range(len(needs)), key=lambda i: (-size[i], i)):
        holder = min(needs[index][3], key=lambda h: (load.get(h.rank, 0), h.rank))
        load[holder.rank] = load.get(holder.rank, 0) + size[index]
        chosen[index] = holder
    pairs: dict[tuple[int, int], list[Copy]] = {}
    for index, (target, piece, box, _, tensor) in enumerate(needs):
        holder = chosen[index]
        pairs.setdefault((holder.rank, target), []).append(_copy(holder.piece, piece, box, tensor))
    return pairs


def _copy(source: Piece, target: Piece, box: Box, tensor: Tensor) -> Copy:
    def offset(piece: Piece) -> int:
        return piece.offset + (box.top - piece.box.top) * piece.pitch + (box.left - piece.box.left) * tensor.item_bytes

    rows, row_bytes = box.bottom - box.top, (box.right - box.left) * tensor.item_bytes
    source_pitch, target_pitch = source.pitch, target.pitch
    if rows == 1 or source_pitch == target_pitch == row_bytes:  # contiguous on both sides: one run
        rows, row_bytes = 1, rows * row_bytes
        source_pitch = target_pitch = row_bytes
    return Copy(
        tensor.name, source.buffer, offset(source), source_pitch, target.buffer, offset(target), target_pitch,
        rows, row_bytes,
    )  # fmt: skip


def _batches(source: int, target: int, copies: list[Copy]) -> Iterator[Batch]:
    """Runs of copies of at least BATCH_BYTES each; what is left over joins the last one."""
    batches: list[list[Copy]] = []
    current: list[Copy] = []
    size = 0
    for copy in copies:
        current.append(copy)
        size += copy.nbytes
        if size >= BATCH_BYTES:
            batches.append(current)
            current, size = [], 0
    if batches:
        batches[-1] += current
    else:
        batches.append(current)
    for batch in batches:
        yield Batch(source, target, tuple(batch))
