"""Quantised forms of a transfer: codes and scales in place of weights, as tensors of their own.

A weight is quantised once, by the rank that sends it; the planner then moves codes and scales like anything else, to
where the engine keeps them. Both sides' layouts are rewritten by the same rule, so a cut that would go through a block
(the elements that share a scale) is refused here, before anything is planned, with the tensor and the sizes.

    form = FORMS["fp8_block"]
    sender, receiver = sending_layout(trainer, form), receiving_layout(engine, form)
    source.buffers = quantise(trainer, rank, buffers, form)      # what `sender` says this rank holds

Quantised are the weights of projections; embeddings, the head, norms, biases and routers stay as they are. Names are
those of published checkpoints: `weight` and `weight_scale_inv` (DeepSeek-V3's block fp8; mxfp8 likewise),
`weight_packed` and `weight_scale` (compressed-tensors' int4). Scales in another layout than row-major have it in their
tensor's name, `weight_scale_inv:hopper`: sides that differ in it do not fit together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from zerokl import kernels
from zerokl.kernels import contract
from zerokl.weightsync.layout import ITEM_BYTES, Box, Layout, LayoutError, Piece, Rank, Tensor
from zerokl.weightsync.scale_layout import BLACKWELL, HOPPER, ROW_MAJOR, ScaleLayout
from zerokl.weightsync.transports.base import Buffers

_WEIGHT = ".weight"
_QUANTISED = re.compile(r"_proj(_with_mqa)?\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_SOURCE_DTYPE = "bfloat16"
_INVERSE = _WEIGHT, ".weight_scale_inv"


@dataclass(frozen=True)
class WireForm:
    """One quantiser of the contract: blocks of ``rows x columns`` weights share a scale, ``per_code`` share a code.

    quantise: bf16 [rows, columns] -> (codes, row-major; scales, lying like ``layout``).
    """

    name: str
    rows: int
    columns: int
    code: str
    per_code: int
    scale: str
    suffixes: tuple[str, str]
    quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    layout: ScaleLayout = ROW_MAJOR

    def parts(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and the scales of a weight."""
        stem = tensor.name.removesuffix(_WEIGHT)
        blocks = -(-tensor.rows // self.rows), -(-tensor.columns // self.columns)
        codes = Tensor(stem + self.suffixes[0], (tensor.rows, tensor.columns // self.per_code), self.code)
        return codes, Tensor(stem + self.suffixes[1], self.layout.shape(*blocks), self.scale)

    def boxes(self, tensor: Tensor, box: Box) -> tuple[Box, Box]:
        """What a box of the weight is in codes and in blocks. Raises LayoutError if it cuts a block, or scales that
        share an item."""
        together = self.columns * self.layout.packed
        rows, columns = (box.top, box.bottom, tensor.rows), (box.left, box.right, tensor.columns)
        for (low, high, end), size, what in (
            (rows, self.rows, "rows {}..{} cut blocks of {}"),
            (columns, self.columns, "columns {}..{} cut blocks of {}"),
            (columns, together, f"columns {{}}..{{}} cut the {{}} that {self.layout.packed} packed scales stand for"),
        ):
            if low % size or (high % size and high != end):
                text = what.format(low, high, size)
                raise LayoutError(f"{tensor.name!r} of shape {tensor.shape}: {text} ({self.name})")
        codes = Box(box.top, box.bottom, box.left // self.per_code, box.right // self.per_code)
        blocks = Box(
            box.top // self.rows, -(-box.bottom // self.rows), box.left // self.columns, -(-box.right // self.columns)
        )
        return codes, blocks


def _fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = kernels.quantize_fp8_block(x, block=(contract.FP8_BLOCK, contract.FP8_BLOCK))
    return q.codes, q.scales


def _fp8_hopper(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = _fp8(x)
    return codes, kernels.to_hopper_scales(scales)


def _fp8_blackwell(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = kernels.quantize_fp8_block(x, block=(contract.FP8_BLOCK, contract.FP8_BLOCK), power_of_two=True)
    return q.codes, kernels.to_blackwell_scales(q.scales)


def _fp8_form(
    name: str, scale: str, quantise: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], layout: ScaleLayout
) -> WireForm:
    block = contract.FP8_BLOCK
    suffix = _INVERSE[1] + ("" if layout is ROW_MAJOR else f":{layout.name}")
    return WireForm(name, block, block, "float8_e4m3fn", 1, scale, (_INVERSE[0], suffix), quantise, layout)


def _int4(group: int) -> WireForm:
    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.quantize_int4_group(x, group=group)

    suffixes = ".weight_packed", ".weight_scale"
    return WireForm(f"int4_group{group}", 1, group, "int32", 8, "bfloat16", suffixes, quantise)


FORMS = {
    form.name: form
    for form in (
        _fp8_form("fp8_block", "float32", _fp8, ROW_MAJOR),
        _fp8_form("fp8_block_hopper", "float32", _fp8_hopper, HOPPER),
        _fp8_form("fp8_block_blackwell", "int32", _fp8_blackwell, BLACKWELL),
        WireForm("mxfp8", 1, contract.MX_BLOCK, "float8_e4m3fn", 1, "float8_e8m0fnu", _INVERSE, kernels.quantize_mxfp8),
        _int4(32),
        _int4(128),
    )
}
"""By name. fp8_block comes in three layouts of its scales, of which Blackwell's holds powers of two; mxfp8 rounds its
scales up (`rceil`); int4 comes with 32 or 128 weights to a scale."""


def is_quantised(tensor: Tensor) -> bool:
    """Whether a quantised form changes this tensor."""
    return tensor.dtype == _SOURCE_DTYPE and len(tensor.shape) == 2 and bool(_QUANTISED.search(tensor.name))


def sending_layout(layout: Layout, form: WireForm) -> Layout:
    """The layout with codes and scales in buffers of their own, one pair for each weight that a rank has a share of.

    Raises LayoutError, naming tensor and sizes, if a weight's columns or a rank's share do not consist of whole blocks.
    """
    tensors = layout.check("sender")
    return Layout(_tensors(layout, form), _each(layout, lambda rank: _sending(rank, tensors, form)))


def receiving_layout(layout: Layout, form: WireForm) -> Layout:
    """The layout with codes in place of weights, and for each buffer of them one more, ``NAME:scales``: those of the
    matrix that the buffer holds, in the form's layout, or of one matrix for each expert, one after the other.

    Raises LayoutError, naming tensor and sizes, if a weight in a fused buffer does not begin and end between blocks.
    """
    tensors = layout.check("receiver")
    return Layout(_tensors(layout, form), _each(layout, lambda rank: _receiving(rank, tensors, form)))


def quantise(layout: Layout, rank: int, buffers: Buffers, form: WireForm) -> dict[str, torch.Tensor]:
    """The buffers (uint8) of one rank of `sending_layout`, from those of the layout itself.

    Costs memory for one weight at a time beside the codes; buffers without quantised weights are passed on as they are.
    """
    tensors, held = {tensor.name: tensor for tensor in layout.tensors}, layout.ranks[rank]
    kept = {piece.buffer for piece in held.pieces if not is_quantised(tensors[piece.tensor])}
    made = {name: buffers[name] for name in held.buffers if name in kept}
    for (name, box), pieces in _shares(held, tensors).items():
        device = buffers[pieces[0].buffer].device
        weight = torch.empty(box.bottom - box.top, box.right - box.left, dtype=torch.bfloat16, device=device)
        for piece in pieces:
            _inside(weight, box, piece.box).copy_(_values(buffers[piece.buffer], piece))
        (codes, scales), (code_part, scale_part) = form.quantise(weight), form.parts(tensors[name])
        made[_buffer(code_part, box, tensors[name])] = codes.contiguous().view(torch.uint8).reshape(-1)
        made[_buffer(scale_part, box, tensors[name])] = form.layout.memory(scales)
    return made


def _each(layout: Layout, change: Callable[[Rank], Rank]) -> tuple[Rank, ...]:
    """Every rank changed; copies of an engine, which share their ranks, go on sharing them."""
    changed = {id(rank): change(rank) for rank in {id(rank): rank for rank in layout.ranks}.values()}
    return tuple(changed[id(rank)] for rank in layout.ranks)


def _tensors(layout: Layout, form: WireForm) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for tensor in layout.tensors:
        if is_quantised(tensor) and tensor.columns % form.per_code:
            raise LayoutError(f"{tensor.name!r} of shape {tensor.shape} has no whole codes of {form.per_code} columns")
        if is_quantised(tensor) and form.rows == 1 and tensor.columns % form.columns:
            raise LayoutError(
                f"{tensor.name!r} of shape {tensor.shape}: {tensor.columns} columns are no whole blocks of "
                f"{form.columns} ({form.name})"
            )
        found += form.parts(tensor) if is_quantised(tensor) else [tensor]
    return tuple(found)


def _shares(rank: Rank, tensors: dict[str, Tensor]) -> dict[tuple[str, Box], list[Piece]]:
    """(weight, box) -> its pieces. Pieces that continue each other count as one box: Megatron's fused query-key-value
    weight spreads one share over as many pieces as there are key-value heads, which are narrower than a block."""
    found: dict[tuple[str, Box], list[Piece]] = {}
    pieces = [piece for piece in rank.pieces if is_quantised(tensors[piece.tensor])]
    current: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.tensor, p.box.left, p.box.right, p.box.top)):
        if current and not _continues(current[-1], piece):
            found[current[0].tensor, _around(current)] = current
            current = []
        current.append(piece)
    if current:
        found[current[0].tensor, _around(current)] = current
    return found


def _continues(a: Piece, b: Piece) -> bool:
    return (a.tensor, a.box.left, a.box.right, a.box.bottom) == (b.tensor, b.box.left, b.box.right, b.box.top)


def _around(pieces: list[Piece]) -> Box:
    return Box(pieces[0].box.top, pieces[-1].box.bottom, pieces[0].box.left, pieces[0].box.right)


def _buffer(part: Tensor, box: Box, weight: Tensor) -> str:
    """The sender's buffer of one share's codes or scales."""
    whole = (box.bottom - box.top, box.right - box.left) == weight.shape
    return part.name if whole else f"{part.name}[{box.top}:{box.bottom},{box.left}:{box.right}]"


def _sending(rank: Rank, tensors: dict[str, Tensor], form: WireForm) -> Rank:
    kept = [piece for piece in rank.pieces if not is_quantised(tensors[piece.tensor])]
    buffers = {name: rank.buffers[name] for name in rank.buffers if name in {piece.buffer for piece in kept}}
    for name, box in _shares(rank, tensors):
        weight = tensors[name]
        (code_part, scale_part), (codes, blocks) = form.parts(weight), form.boxes(weight, box)
        own = _buffer(code_part, box, weight)
        pitch = (codes.right - codes.left) * code_part.item_bytes
        buffers[own] = (codes.bottom - codes.top) * pitch
        kept.append(Piece(code_part.name, codes, own, 0, pitch))
        own, size = _buffer(scale_part, box, weight), (blocks.bottom - blocks.top, blocks.right - blocks.left)
        buffers[own] = form.layout.nbytes(*size, form.scale)
        kept.append(Piece(scale_part.name, form.layout.box(blocks), own, 0, form.layout.pitch(*size, form.scale)))
    return Rank(buffers, tuple(kept))


def _receiving(rank: Rank, tensors: dict[str, Tensor], form: WireForm) -> Rank:
    buffers, pieces = dict(rank.buffers), []
    stacks: dict[str, list[Piece]] = {}
    for piece in rank.pieces:
        stacks.setdefault(piece.buffer, []).append(piece)
    for name, stack in stacks.items():
        if not any(is_quantised(tensors[piece.tensor]) for piece in stack):
            pieces += stack
            continue
        rows, scales = rank.buffers[name] // stack[0].pitch, 0
        for matrix, top, height in _matrices(stack, rows):
            high = -(-height // form.rows)
            for piece in matrix:
                weight = tensors[piece.tensor]
                row, above = _place(piece, weight, top, form)
                (code_part, scale_part), (codes, blocks) = form.parts(weight), form.boxes(weight, piece.box)
                pitch, wide = (codes.right - codes.left) * code_part.item_bytes, blocks.right - blocks.left
                buffers[name] = rows * pitch
                pieces.append(Piece(code_part.name, codes, name, row * pitch, pitch))
                pitch = form.layout.pitch(high, wide, form.scale)
                offset = scales + form.layout.offset(above, pitch, form.scale)
                pieces.append(Piece(scale_part.name, form.layout.box(blocks), f"{name}:scales", offset, pitch))
            scales += form.layout.nbytes(high, wide, form.scale)
        buffers[f"{name}:scales"] = scales
    return Rank(buffers, tuple(pieces))


def _matrices(stack: list[Piece], rows: int) -> list[tuple[list[Piece], int, int]]:
    """The matrices in a buffer of so many rows, which lie one below the other: (pieces, first row, rows). Each expert's
    are its own; what an engine multiplies as one, like query, key and value, has its scales as one."""
    stack = sorted(stack, key=lambda piece: piece.offset)
    matrices = [list(pieces) for _, pieces in itertools.groupby(stack, lambda piece: _EXPERT.findall(piece.tensor))]
    tops = [pieces[0].offset // pieces[0].pitch for pieces in matrices]
    return [(p, top, end - top) for p, top, end in zip(matrices, tops, [*tops[1:], rows], strict=True)]


def _place(piece: Piece, weight: Tensor, top: int, form: WireForm) -> tuple[int, int]:
    """The row of its buffer that a piece begins at, and how many rows of blocks are above it in its matrix, whose first
    row is ``top``. Raises LayoutError for a buffer that is no stack of weights, or a piece that begins in a block."""
    row, beside = divmod(piece.offset, piece.pitch)
    if not is_quantised(weight) or beside or piece.pitch != (piece.box.right - piece.box.left) * weight.item_bytes:
        raise LayoutError(f"{piece.buffer!r} holds more than a stack of weights at {piece.tensor!r}: {form.name}")
    above, cut = divmod(row - top, form.rows)
    if cut:
        raise LayoutError(
            f"{piece.tensor!r} of shape {weight.shape} begins at row {row} of {piece.buffer!r}: "
            f"not between blocks of {form.rows} rows ({form.name})"
        )
    return row, above


def _values(buffer: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The weights of a piece, bf16 [rows, columns], in the buffer's memory."""
    item = ITEM_BYTES[_SOURCE_DTYPE]
    shape = piece.box.bottom - piece.box.top, piece.box.right - piece.box.left
    start = buffer.view(torch.bfloat16)
    return start.as_strided(shape, (piece.pitch // item, 1), start.storage_offset() + piece.offset // item)


def _inside(share: torch.Tensor, box: Box, inner: Box) -> torch.Tensor:
    return share[inner.top - box.top : inner.bottom - box.top, inner.left - box.left : inner.right - box.left]
