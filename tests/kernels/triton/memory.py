"""What a GPU punishes and Triton's interpreter forgives: access outside the tensors of a launch, and races.

The interpreter runs the programs of a launch one after the other, reads whatever lies behind a tensor and lets a later
program overwrite what an earlier one stored too far. Here every element that is touched must lie in a tensor of the
launch, and none that one program writes may be touched by another.
"""

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

NOBODY, SEVERAL = -1, -2


class Tensors:
    """The tensors that one launch may touch, and which program touched which of their elements."""

    def __init__(self, tensors):
        spans = sorted({span for t in tensors if t.numel() for span in [_span(t)]})
        self.begins = np.array([begin for begin, _ in spans], np.uint64)
        # one that starts inside another does not end its span
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))
        sizes = (self.ends - self.begins).astype(np.int64)
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.readers, self.writers = np.full((2, sizes.sum()), NOBODY, np.int32)

    def touch(self, address, width, program, write):
        """One access of ``program`` to elements of ``width`` bytes; AssertionError for what a GPU would not forgive."""
        span = np.searchsorted(self.begins, address, "right") - 1
        inside = (span >= 0) & (address + np.uint64(width) <= self.ends[span])
        assert inside.all(), f"program {program} touches {np.count_nonzero(~inside)} elements outside its tensors"
        at = self.starts[span] + (address - self.begins[span]).astype(np.int64)
        self._alone(self.writers[at], program, "written")
        if write:
            self._alone(self.readers[at], program, "read")
            self.writers[at] = program
        else:
            before = self.readers[at]
            self.readers[at] = np.where((before == NOBODY) | (before == program), program, SEVERAL)

    @staticmethod
    def _alone(before, program, what):
        others = np.count_nonzero((before != NOBODY) & (before != program))
        assert not others, f"program {program} touches {others} elements {what} by another"


def _span(t):
    """[begin, end) of the addresses of a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def watch():
    """From here on every launch is watched. Returns a list for tensors that the next one reaches by their address."""
    launch, by_address = Tensors([]), []
    begin, load, store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def watched_begin(self, *arguments):
        nonlocal launch
        positional, named = begin(self, *arguments)
        launch = Tensors([t for t in (*positional, *named.values(), *by_address) if isinstance(t, torch.Tensor)])
        by_address.clear()
        return positional, named

    def touch(builder, pointers, mask, write):
        address = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        launch.touch(address, pointers.get_element_ty().primitive_bitwidth // 8, program, write)

    def watched_load(self, pointers, mask, *rest):
        touch(self, pointers, mask, write=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        touch(self, pointers, mask, write=True)
        return store(self, pointers, value, mask, *rest)

    GridExecutor._init_args_hst = watched_begin
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = watched_load, watched_store
    return by_address
