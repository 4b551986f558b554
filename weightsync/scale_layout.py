"""Where the scales of a quantised weight lie in memory: row by row, or as a GPU's matrix product loads them.

The scales of one matrix are a matrix themselves: a row for each row of blocks, a column for each column of blocks. The
planner moves boxes of rows, so it is told of the transposed matrix where scales lie column by column; bytes that only
align a column belong to no copy, and are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zerokl.weightsync.layout import ITEM_BYTES, Box


@dataclass(frozen=True)
class ScaleLayout:
    """``column_multiple`` 0: row-major. Else column by column, each padded to a multiple of so many items.

    packed: how many neighbours of a row share an item, the first one in its lowest bytes.
    """

    name: str
    column_multiple: int = 0
    packed: int = 1

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The tensor that the planner sees, for ``rows x columns`` scales."""
        items = -(-columns // self.packed)
        return (items, rows) if self.column_multiple else (rows, items)

    def box(self, scales: Box) -> Box:
        """What a box of scales is in that tensor. Its left edge lies between items; its right one does, or is the end
        of the whole matrix."""
        left, right = scales.left // self.packed, -(-scales.right // self.packed)
        if self.column_multiple:
            return Box(left, right, scales.top, scales.bottom)
        return Box(scales.top, scales.bottom, left, right)

    def pitch(self, rows: int, columns: int, dtype: str) -> int:
        """Bytes from one row of that tensor to the next, where a rank has ``rows x columns`` scales."""
        if self.column_multiple:
            return -(-rows // self.column_multiple) * self.column_multiple * ITEM_BYTES[dtype]
        return self.shape(rows, columns)[1] * ITEM_BYTES[dtype]

    def nbytes(self, rows: int, columns: int, dtype: str) -> int:
        """Bytes of such a matrix, padding included."""
        return self.shape(rows, columns)[0] * self.pitch(rows, columns, dtype)

    def offset(self, above: int, pitch: int, dtype: str) -> int:
        """Where in it the part begins that has ``above`` rows of scales above it."""
        return above * (ITEM_BYTES[dtype] if self.column_multiple else pitch)

    def memory(self, scales: torch.Tensor) -> torch.Tensor:
        """The bytes of a matrix that lies like this, uint8 [n], padding included."""
        if self.column_multiple:
            scales = scales.as_strided((scales.shape[1], scales.stride(1)), (scales.stride(1), 1))
        return scales.contiguous().view(torch.uint8).reshape(-1)


ROW_MAJOR = ScaleLayout("row-major")
HOPPER = ScaleLayout("hopper", column_multiple=4)
"""fp32, as `kernels.to_hopper_scales` has them: columns start on TMA's 16 bytes."""
BLACKWELL = ScaleLayout("blackwell", column_multiple=4, packed=4)
"""UE8M0, four to an int32, as `kernels.to_blackwell_scales` has them."""
