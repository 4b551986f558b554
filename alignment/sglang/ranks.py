"""The engine's ranks that share one model: row-parallel products by contract R2's segments and tree.

SGLang leaves sums over ranks to the boundaries between its layers, in bf16 and in the communication library's order.
Here every row-parallel module completes its own sum (`Ranks.meet`), as Megatron's side does, and the group's own sum,
which SGLang still calls, finds a whole value and hands it on (`Ranks.replace_sums`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from sglang.srt.runtime_context import get_parallel

from zerokl import kernels
from zerokl.alignment.sglang.errors import UnsupportedError

if TYPE_CHECKING:
    from zerokl.alignment.sglang.hooks import Hook


class Ranks:
    """This rank among those that share the model, and its part of R2's ``segments``.

    Raises UnsupportedError for a layout beyond tensor parallelism, or segments that the ranks do not divide.
    """

    def __init__(self, segments: int) -> None:
        parallel = get_parallel()
        self.rank, self.size, self._coordinator = parallel.tp_rank, parallel.tp_size, parallel.tp_group
        sizes = {"pp": parallel.pp_size, "dp": parallel.dp_size, "moe_ep": parallel.moe_ep_size}
        groups = (parallel.attn_tp_group, parallel.moe_tp_group)
        if set(sizes.values()) != {1} or any(group is not self._coordinator for group in groups):
            raise UnsupportedError(f"only tensor parallelism over one group is supported: got sizes {sizes}")
        if segments % self.size:
            raise UnsupportedError(f"engine: segments={segments} must cover tensor={self.size}")
        self.own_segments = segments // self.size
        self._met: Hook | None = None

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks, in order."""
        return self._coordinator.device_group

    def gathered(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's value, in rank order. Every rank must call it."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)  # not as objects: no pickle
        sizes = self._all(torch.tensor([len(text)]))
        longest = max(map(int, sizes))
        texts = self._all(torch.cat([text, text.new_zeros(longest - len(text))]))
        return [json.loads(padded[: int(size)].numpy().tobytes()) for padded, size in zip(texts, sizes, strict=True)]

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._coordinator.cpu_group)
        return parts

    def replace_sums(self, met: Hook, left: Hook) -> None:
        """Count the sums over ranks in ``met``, and in ``left`` SGLang's own, which then have nothing to add."""
        self._met = met

        def whole(x: torch.Tensor) -> torch.Tensor:
            if x.dtype is not torch.bfloat16:
                raise UnsupportedError(f"a sum of {x.dtype} over ranks that zerokl does not know")
            left.calls += 1
            return x

        left.attach(self._coordinator, "all_reduce", whole)

    def meet(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' fp32 parts by R2's tree, rounded once to bf16."""
        if self._met is not None:
            self._met.calls += 1
        return kernels.tree_all_reduce(part, self.group).to(torch.bfloat16)

    def row_linear(self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ w.T (+ bias)`` where each rank holds its columns of w: bf16 [..., N], the same on every rank."""
        if self.size == 1:
            return kernels.linear(x, w, bias, segments=self.own_segments)
        return self.meet(kernels.linear(x, w, segments=self.own_segments, out_dtype=torch.float32))

    def grouped_row_linear(self, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """The same for the rows of every expert; each rank holds its columns of all experts' w."""
        if self.size == 1:
            return kernels.grouped_linear(x, w, offsets, segments=self.own_segments)
        part = kernels.grouped_linear(x, w, offsets, segments=self.own_segments, out_dtype=torch.float32)
        return self.meet(part)

    def embedding(self, ids: torch.Tensor, module: Any) -> torch.Tensor:
        """Rows of a table whose rows the ranks share: bf16 [T, H], an exact copy.

        Raises RuntimeError for an id outside the vocabulary.
        """
        if self.size == 1:
            return kernels.embedding(ids, module.weight)
        if bool(((ids < 0) | (ids >= module.org_vocab_size)).any()):
            raise RuntimeError(f"a token id lies outside [0, {module.org_vocab_size})")
        share = module.shard_indices
        mine = ((ids >= share.org_vocab_start_index) & (ids < share.org_vocab_end_index)).nonzero()[:, 0]
        rows = kernels.embedding(ids[mine] - share.org_vocab_start_index, module.weight)
        merged = rows.new_zeros(len(ids), rows.shape[1]).index_copy(0, mine, rows)
        dist.all_reduce(merged.view(torch.int32), group=self.group)  # as integers: a float sum would turn -0 into +0
        return merged
