"""What the rollout engine and the trainer say to each other: requests, generations and packed training batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from zerokl.alignment import routing_replay

LossFunction = Callable[[torch.Tensor, int], torch.Tensor]
"""``loss_fn(logprobs fp32 [n] of a micro-batch, its index)``: a scalar to minimise, summed over micro-batches."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    temperature 0 means greedy. ``top_k`` 0 and ``top_p`` 1 switch the filters off. ``seed`` with the token's absolute
    position decides the token: the same request gives the same tokens in any batch.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt as token ids. ``arrival_s`` delays its submission, to let it join a running batch."""

    input_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float = 0.0


@dataclass(frozen=True)
class WeightSpan:
    """Tokens [start, end) of a response were sampled with the weights of ``version``."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Generation:
    """What the engine returned for one request, token by token, as decoded.

    ``logprobs`` (fp32 [n]): log-probability under the sampled distribution (temperature, top-p, top-k renormalised);
    ``raw_logprobs`` (fp32 [n]): the same at temperature 1 without filters. ``routed_experts``: the routing record
    (see `routing_replay`) of prompt and response without its last token, where the engine captures experts.
    ``weight_version``: that of the last token; ``weight_spans``: those of all tokens, in order, where the weights
    changed on the way. ``finish_reason``: stop, length, or abort for one that new weights ended.
    """

    output_ids: tuple[int, ...]
    logprobs: np.ndarray
    raw_logprobs: np.ndarray
    finish_reason: str
    weight_version: str
    cached_tokens: int = 0
    routed_experts: np.ndarray | None = None
    weight_spans: tuple[WeightSpan, ...] = ()

    @property
    def weight_versions(self) -> set[str]:
        """Every version that sampled a token of this response."""
        return {span.version for span in self.weight_spans} or {self.weight_version}


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, as the trainer sees them (no padding).

    tokens int64 [T]; positions int64 [T] (restart at 0 in every sequence); cu_seqlens int32 [B + 1];
    rows int64 [n]: the packed rows whose next token was sampled; targets int64 [n]: those tokens;
    temperature fp32 [n], top_p fp32 [n], top_k int32 [n]: the distribution each was sampled from (greedy, temperature
    0 or top_k 1, is scored at temperature 1 without filters); sequence int64 [n]: the sequence each row belongs to.
    routed_experts uint8 or uint16 [T, sparse layers, top_k]: the slab of routing records, where there are any.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    sequence: torch.Tensor = field(repr=False)
    routed_experts: torch.Tensor | None = field(default=None, repr=False)

    @staticmethod
    def pack(requests: Sequence[Request], generations: Sequence[Generation]) -> PackedBatch:
        """Pack prompt + response of each pair, in the order given; every generated token becomes a target.

        Raises ValueError for unequal lengths, an empty prompt or an empty batch, RoutingError for routing records
        that do not fit.
        """
        if len(requests) != len(generations) or not requests:
            got = f"{len(requests)} requests, {len(generations)} generations"
            raise ValueError(f"pack needs as many generations as requests, and at least one: got {got}")
        tokens: list[int] = []
        positions: list[int] = []
        cu = [0]
        rows: list[int] = []
        targets: list[int] = []
        sampling: list[tuple[float, float, int]] = []
        owner: list[int] = []
        for index, (request, generation) in enumerate(zip(requests, generations, strict=True)):
            if not request.input_ids:
                raise ValueError(f"request {index} has an empty prompt: nothing precedes its first sampled token")
            # the last sampled token is never fed back, exactly as in decoding
            ids = (
                [*request.input_ids, *generation.output_ids[:-1]] if generation.output_ids else list(request.input_ids)
            )
            start, first = cu[-1], cu[-1] + len(request.input_ids) - 1
            tokens += ids
            positions += range(len(ids))
            cu.append(start + len(ids))
            n = len(generation.output_ids)
            rows += range(first, first + n)
            targets += generation.output_ids
            s = request.sampling
            greedy = s.temperature == 0 or s.top_k == 1  # SGLang's own form of greedy
            sampling += [(1.0, 1.0, 0) if greedy else (s.temperature, s.top_p, s.top_k)] * n
            owner += [index] * n
        return PackedBatch(
            tokens=torch.tensor(tokens, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            rows=torch.tensor(rows, dtype=torch.int64),
            targets=torch.tensor(targets, dtype=torch.int64),
            temperature=torch.tensor([s[0] for s in sampling], dtype=torch.float32),
            top_p=torch.tensor([s[1] for s in sampling], dtype=torch.float32),
            top_k=torch.tensor([s[2] for s in sampling], dtype=torch.int32),
            sequence=torch.tensor(owner, dtype=torch.int64),
            routed_experts=routing_replay.slab([g.routed_experts for g in generations], np.diff(cu).tolist()),
        )

    def padded(self, multiple: int) -> PackedBatch:
        """The batch with tokens up to a multiple of ``multiple``, as sequences of one token that nothing scores.

        Other rows' bits and gradients do not change (contract R0); padding adds zeros to weights' gradients.
        """
        missing = -len(self.tokens) % multiple
        if missing == 0:
            return self
        zeros, last = self.tokens.new_zeros(missing), self.cu_seqlens[-1]
        records = self.routed_experts
        if records is not None:  # any experts will do
            records = torch.cat([records, records[-1:].expand(missing, -1, -1)])
        return replace(
            self,
            tokens=torch.cat([self.tokens, zeros]),
            positions=torch.cat([self.positions, zeros]),
            cu_seqlens=torch.cat([self.cu_seqlens, last + torch.arange(1, missing + 1, dtype=torch.int32)]),
            routed_experts=records,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **tensors)
