"""What each rank of one side holds, and where: the typed layouts that `plan` works from.

Tensors carry their Hugging Face names and global shapes. A tensor counts as a matrix: rows are its first dimension,
columns all the others. A *piece* is a box of such a matrix that lies in one of a rank's *buffers* (a parameter as the
engine stores it), row after row, `pitch` bytes apart. Fused parameters hold several pieces.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import msgspec

from zerokl.weightsync.errors import WeightSyncError

ITEM_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1,
    "int32": 4,
    "uint8": 1,
}
MAX_TENSOR_BYTES = 1 << 40


class LayoutError(WeightSyncError):
    """A layout that contradicts itself, or a split that the model's sizes do not allow."""


class Typed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything here: immutable, and decodable from a message without surprises."""


class Tensor(Typed, frozen=True):
    """One tensor of the model: its global shape and its dtype's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * self.item_bytes


class Box(Typed, frozen=True, order=True):
    """Rows [top, bottom) and columns [left, right) of a tensor, in elements."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def elements(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def intersect(self, other: Box) -> Box | None:
        """What both have in common; None if that is nothing."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Box(top, bottom, left, right) if top < bottom and left < right else None

    def without(self, inner: Box) -> list[Box]:
        """The rest of this box around ``inner``, which lies inside it: at most four boxes."""
        around = [
            Box(self.top, inner.top, self.left, self.right),
            Box(inner.bottom, self.bottom, self.left, self.right),
            Box(inner.top, inner.bottom, self.left, inner.left),
            Box(inner.top, inner.bottom, inner.right, self.right),
        ]
        return [box for box in around if box.top < box.bottom and box.left < box.right]


class Piece(Typed, frozen=True):
    """A box of a tensor in a buffer: its first byte is at ``offset``, its rows start ``pitch`` bytes apart."""

    tensor: str
    box: Box
    buffer: str
    offset: int
    pitch: int


class Rank(Typed, frozen=True):
    """Buffers of one rank (name -> bytes) and the pieces in them. Bytes outside of pieces are padding."""

    buffers: dict[str, int]
    pieces: tuple[Piece, ...]


class Layout(Typed, frozen=True):
    """One side: the model's tensors and what each rank holds of them."""

    tensors: tuple[Tensor, ...]
    ranks: tuple[Rank, ...]

    def check(self, side: str) -> dict[str, Tensor]:
        """The tensors by name. Raises LayoutError, naming side, rank and piece, unless every piece lies inside its
        tensor and its buffer and no two pieces share memory."""
        tensors = {tensor.name: tensor for tensor in self.tensors}
        if len(tensors) != len(self.tensors):
            raise LayoutError(f"{side}: a tensor is listed twice")
        for tensor in self.tensors:
            if tensor.dtype not in ITEM_BYTES:
                raise LayoutError(f"{side}: {tensor.name!r} has dtype {tensor.dtype!r}, known are {list(ITEM_BYTES)}")
            if any(size < 1 for size in tensor.shape) or tensor.nbytes > MAX_TENSOR_BYTES:
                raise LayoutError(f"{side}: {tensor.name!r} has shape {tensor.shape}")
        distinct = {id(rank): (rank, number) for number, rank in reversed(list(enumerate(self.ranks)))}
        for rank, number in reversed(distinct.values()):  # the copies of an engine share their ranks
            _check_rank(rank, tensors, f"{side} rank {number}")
        return tensors


def _check_rank(rank: Rank, tensors: dict[str, Tensor], what: str) -> None:
    spans: dict[str, list[_Span]] = {name: [] for name in rank.buffers}
    for piece in rank.pieces:
        tensor, box = tensors.get(piece.tensor), piece.box
        if tensor is None or piece.buffer not in rank.buffers:
            raise LayoutError(f"{what}: piece of {piece.tensor!r} in {piece.buffer!r}: no such tensor or buffer")
        if not (0 <= box.top < box.bottom <= tensor.rows and 0 <= box.left < box.right <= tensor.columns):
            raise LayoutError(f"{what}: {box} is not inside {piece.tensor!r} of shape {tensor.shape}")
        width = (box.right - box.left) * tensor.item_bytes
        end = piece.offset + (box.bottom - box.top - 1) * piece.pitch + width
        if piece.offset < 0 or piece.pitch < width or end > rank.buffers[piece.buffer]:
            raise LayoutError(
                f"{what}: {piece.tensor!r} at {piece.offset}..{end}, pitch {piece.pitch}, is not inside "
                f"{piece.buffer!r} of {rank.buffers[piece.buffer]} bytes"
            )
        spans[piece.buffer].append((piece.offset, end, piece.pitch, width, piece.tensor))
    for buffer, found in spans.items():
        for group in _mixed(sorted(found)):
            _check_side_by_side(group, f"overlap in {buffer!r}", what)


_Span = tuple[int, int, int, int, str]
"""Of a piece: its first byte, the end of its last row, pitch, bytes of a row, tensor."""


def _mixed(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Runs of spans, in order, of which each begins before one in front of it ends."""
    group: list[_Span] = []
    reached = 0
    for span in spans:
        if group and span[0] >= reached:
            yield group
            group = []
        group.append(span)
        reached = max(reached, span[1])
    if group:
        yield group


def _check_side_by_side(group: list[_Span], problem: str, what: str) -> None:
    """Raise LayoutError unless these are columns of one matrix, no byte of a row belonging to two of them."""
    origin, _, pitch, *_ = group[0]
    columns = sorted(((start - origin) % pitch, width, own, tensor) for start, _, own, width, tensor in group)
    for (left, width, _, first), (right, wide, own, second) in itertools.pairwise(columns):
        if left + width > right or own != pitch or right + wide > pitch:
            raise LayoutError(f"{what}: {first!r} and {second!r} {problem}")


class RankBuilder:
    """Collects the buffers of one rank, each a stack of equally wide boxes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._buffers: dict[str, int] = {}
        self._pieces: list[Piece] = []

    def stack(self, buffer: str, boxes: list[tuple[str, Box]], *, rows: int = 0) -> None:
        """Add a buffer that holds the boxes (tensor name, box) one below the other, padded to ``rows`` rows."""
        item = self._tensors[boxes[0][0]].item_bytes
        pitch = (boxes[0][1].right - boxes[0][1].left) * item
        offset = 0
        for name, box in boxes:
            if box.elements:  # a share of the vocabulary can be padding alone
                self._pieces.append(Piece(name, box, buffer, offset, pitch))
            offset += (box.bottom - box.top) * pitch
        self._buffers[buffer] = max(offset, rows * pitch)

    def whole(self, buffer: str, name: str) -> None:
        """Add a buffer that holds one whole tensor."""
        self.stack(buffer, [(name, full(self._tensors[name]))])

    def build(self) -> Rank:
        return Rank(self._buffers, tuple(self._pieces))


def full(tensor: Tensor) -> Box:
    """The box of all elements."""
    return Box(0, tensor.rows, 0, tensor.columns)


def row_share(tensor: Tensor, index: int, count: int) -> Box:
    """Part ``index`` of ``count`` equal parts of the rows. Raises LayoutError if they do not divide."""
    size = even(tensor.rows, count, f"the rows of {tensor.name}")
    return Box(index * size, (index + 1) * size, 0, tensor.columns)


def column_share(tensor: Tensor, index: int, count: int) -> Box:
    """Part ``index`` of ``count`` equal parts of the columns. Raises LayoutError if they do not divide."""
    size = even(tensor.columns, count, f"the columns of {tensor.name}")
    return Box(0, tensor.rows, index * size, (index + 1) * size)


def vocabulary_share(tensor: Tensor, index: int, count: int, multiple: int) -> tuple[Box, int]:
    """Rows of part ``index`` when the vocabulary is padded to ``multiple``: (the real ones, how many with padding)."""
    padded = -(-tensor.rows // multiple) * multiple
    size = even(padded, count, f"the padded rows of {tensor.name}")
    top = min(index * size, tensor.rows)
    return Box(top, min((index + 1) * size, tensor.rows), 0, tensor.columns), size


def even(total: int, parts: int, what: str) -> int:
    """``total / parts``. Raises LayoutError if that is no whole number."""
    if parts < 1 or total % parts:
        raise LayoutError(f"{what} ({total}) do not divide into {parts} parts")
    return total // parts
