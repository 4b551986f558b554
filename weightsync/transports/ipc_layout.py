"""What the two ends of `ipc` tell each other, and what lies where in a sender's file.

A file begins with the sender's own buffers, if it keeps them there (`Own`). A receiver's buffer that lies there
already, byte for byte, is a view of them. The others follow, each as its receiver wants it; then one byte for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from zerokl.weightsync.layout import MAX_TENSOR_BYTES, Typed
from zerokl.weightsync.messages import Nonce, name_of
from zerokl.weightsync.plan import Copy, Plan
from zerokl.weightsync.transports.base import TransferError
from zerokl.weightsync.transports.memory_file import PAGE

_ALIGNED = 64
"""Bytes: a buffer that begins elsewhere is copied, as kernels read aligned memory faster."""

T = TypeVar("T")

Id = Nonce
"""Of a file, or of a receiving process: random, made once."""
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_TENSOR_BYTES)]


class Holding(Typed, frozen=True):
    """What a receiver announces: its buffers (name -> bytes), and ``held``, the files its live version lies in."""

    attempt: Nonce
    process: Id
    sizes: dict[str, Size]
    held: tuple[Id, ...]


class Own(Typed, frozen=True):
    """Buffers of the sender that lie in its file: name -> offset, bytes. ``nbytes``: of all, whole pages."""

    buffers: dict[str, tuple[Size, Size]]
    nbytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]

    @staticmethod
    def of(sizes: Mapping[str, int]) -> Own:
        """These buffers one after the other, each from the start of a page."""
        buffers, end = {}, 0
        for name, size in sizes.items():
            buffers[name] = end, size
            end += pages(size)
        return Own(buffers, end)

    def start(self, parts: tuple[Copy, ...], size: int) -> int | None:
        """Where in the file a receiver's buffer of ``size`` bytes lies already, as these copies would write it; None if
        nowhere."""
        names, shifts = {c.source_buffer for c in parts}, {c.source_offset - c.target_offset for c in parts}
        alike = all(c.rows == 1 or c.source_pitch == c.target_pitch for c in parts)
        complete = sum(copy.nbytes for copy in parts) == size  # with padding it could be another weight's bytes
        if len(names) > 1 or len(shifts) > 1 or not alike or not complete or not names <= self.buffers.keys():
            return None
        (offset, held), shift = self.buffers[names.pop()], shifts.pop()
        fits = shift >= 0 and shift + size <= held and (offset + shift) % _ALIGNED == 0
        return offset + shift if fits and offset + held <= self.nbytes else None


class Export(Typed, frozen=True):
    """What a sender announces: where its file is to be had, and which of its own buffers lie in it."""

    path: Annotated[str, msgspec.Meta(max_length=100)]
    nonce: Nonce
    own: Own


class Region(Typed, frozen=True):
    """Part of the file: a receiver's ``whole`` buffer as it will lie there, or the sender's copies for a buffer that
    others fill too, one after the other. ``index``: its number, and that of its byte in `Arrangement.progress`;
    ``there``: it is part of the sender's own buffers, and nothing has to be written."""

    index: int
    offset: int
    nbytes: int
    whole: bool
    there: bool
    copies: tuple[Copy, ...]


class Arrangement(NamedTuple):
    """What lies where in a sender's file of ``nbytes``: (target, buffer) -> region; from ``progress`` on, one byte for
    each region, 1 when it is finished."""

    regions: dict[tuple[int, str], Region]
    progress: int
    nbytes: int


def arrange(plan: Plan, source: int, endpoints: Mapping[str, bytes], own: Own | None = None) -> Arrangement:
    """What lies where in a sender's file. Both sides compute it, from the plan and from what all announced; ``own``:
    with these buffers of the sender in it, instead of those that it announced.

    Raises TransferError where what was announced does not fit the plan."""
    if own is None:
        own = parse_export(endpoints.get(name_of(source=True, rank=source), b"")).own
    copies: dict[tuple[int, str], list[Copy]] = {}
    senders: dict[tuple[int, str], set[int]] = {}
    for batch in plan.batches:
        for copy in batch.copies:
            place = batch.target, copy.target_buffer
            senders.setdefault(place, set()).add(batch.source)
            if batch.source == source:
                copies.setdefault(place, []).append(copy)
    announced = {target: parse_holding(endpoints, target).sizes for target in {target for target, _ in copies}}
    known: dict[tuple[int, tuple[Copy, ...]], Region] = {}
    regions, end = {}, own.nbytes
    for (target, buffer), parts in copies.items():
        whole = len(senders[target, buffer]) == 1
        extent = max(c.target_offset + (c.rows - 1) * c.target_pitch + c.row_bytes for c in parts)
        size = announced[target].get(buffer, 0) if whole else sum(copy.nbytes for copy in parts)
        if whole and size < extent:
            raise TransferError(f"{name_of(source=False, rank=target)} has {size} bytes in {buffer!r}, not {extent}")
        key = size if whole else -1, tuple(parts)
        if key not in known:
            start = own.start(key[1], size) if whole else None
            known[key] = Region(len(known), end if start is None else start, size, whole, start is not None, key[1])
            end += pages(size) if start is None else 0
        regions[target, buffer] = known[key]
    return Arrangement(regions, end, end + pages(len(known)))


def pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def placed(region: Region) -> Iterator[tuple[Copy, int, int]]:
    """Every copy of a region with the offset of its first byte in it, and the bytes from row to row."""
    end = 0
    for copy in region.copies:
        yield (copy, copy.target_offset, copy.target_pitch) if region.whole else (copy, end, copy.row_bytes)
        end += copy.nbytes


def parse_export(data: bytes) -> Export:
    """Decode what a sender announced. Raises TransferError for anything but a well-formed export."""
    return _parse(data, Export)


def parse_holding(endpoints: Mapping[str, bytes], target: int) -> Holding:
    """Decode what a receiver announced. Raises TransferError for anything else."""
    return _parse(endpoints.get(name_of(source=False, rank=target), b""), Holding)


def receivers(endpoints: Mapping[str, bytes], attempt: bytes) -> dict[str, Holding]:
    """What all receivers announced, by name. Raises TransferError for what was said in another attempt: a file that was
    free then may be served now."""
    found = {name: _parse(data, Holding) for name, data in endpoints.items() if name.startswith("rollout-")}
    for name, holding in found.items():
        if holding.attempt != attempt:
            raise TransferError(f"{name} announced what it holds in another attempt")
    return found


def _parse(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not an ipc endpoint: {error}") from error


_KNOWN = [msgspec.msgpack.Decoder(kind) for kind in (Export, Holding)]  # before threads decode them (`messages`)
