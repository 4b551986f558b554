"""What the rollout engine and the trainer say to each other: requests, generations and packed training batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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


Turn = tuple[Request, Generation]
"""What was asked and what came back; in a conversation, the prompt holds everything before it."""


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, as the trainer sees them (no padding).

    tokens int64 [T]; positions int64 [T] (restart at 0 in every sequence); cu_seqlens int32 [B + 1];
    rows int64 [n]: the packed rows whose next token was sampled; targets int64 [n]: those tokens;
    temperature fp32 [n], top_p fp32 [n], top_k int32 [n]: the distribution each was sampled from (greedy, temperature
    0 or top_k 1, is scored at temperature 1 without filters); sequence int64 [n]: the sequence each row belongs to.
    routed_experts uint8 or uint16 [T, sparse layers, top_k]: the slab of routing records, where there are any.
    ``padding``: how many of the last tokens are there for the layout's sake only. ``order``: a training step takes its
    micro-batches by ascending order, those of equal order as they are handed in.
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
    padding: int = 0
    order: int = 0

    @staticmethod
    def pack(requests: Sequence[Request], generations: Sequence[Generation], *, order: int = 0) -> PackedBatch:
        """Pack prompt + response of each pair, in the order given; every generated token becomes a target.

        Raises ValueError for unequal lengths, an empty prompt or an empty batch, RoutingError for routing records
        that do not fit.
        """
        if len(requests) != len(generations) or not requests:
            got = f"{len(requests)} requests, {len(generations)} generations"
            raise ValueError(f"pack needs as many generations as requests, and at least one: got {got}")
        return PackedBatch.pack_turns([[pair] for pair in zip(requests, generations, strict=True)], order=order)

    @staticmethod
    def pack_turns(samples: Sequence[Sequence[Turn]], *, order: int = 0) -> PackedBatch:
        """Pack conversations, one sequence each: a turn's prompt holds the whole conversation before it (earlier
        responses as sampled, then what tools or users added), and every turn's generated tokens become targets.

        By R0 and R5 of the contract a token's log-probability does not depend on the turns after it. Routing records
        of the turns add up: each one's new tokens follow those already recorded.
        Raises ValueError, naming sample and turn, for an empty prompt, or one that does not continue the turn before;
        RoutingError for routing records that do not fit.
        """
        if not samples or not all(samples):
            raise ValueError("pack_turns needs at least one sample, and a turn in each")
        laid = [_lay_out(turns, f"sample {index}") for index, turns in enumerate(samples)]
        lengths = [len(one.tokens) for one in laid]
        cu = np.cumsum([0, *lengths])
        records = [
            routing_replay.join(
                [g.routed_experts for _, g in turns], [_fed(*turn) for turn in turns], f"sample {index}"
            )
            for index, turns in enumerate(samples)
        ]
        sampling = [triple for one in laid for triple in one.sampling]
        return PackedBatch(
            tokens=torch.tensor([t for one in laid for t in one.tokens], dtype=torch.int64),
            positions=torch.tensor([at for length in lengths for at in range(length)], dtype=torch.int64),
            cu_seqlens=torch.tensor(cu, dtype=torch.int32),
            rows=torch.tensor(
                [int(start) + row for start, one in zip(cu, laid, strict=False) for row in one.rows], dtype=torch.int64
            ),
            targets=torch.tensor([t for one in laid for t in one.targets], dtype=torch.int64),
            temperature=torch.tensor([s[0] for s in sampling], dtype=torch.float32),
            top_p=torch.tensor([s[1] for s in sampling], dtype=torch.float32),
            top_k=torch.tensor([s[2] for s in sampling], dtype=torch.int32),
            sequence=torch.tensor([i for i, one in enumerate(laid) for _ in one.rows], dtype=torch.int64),
            routed_experts=routing_replay.slab(records, lengths),
            order=order,
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
            padding=self.padding + missing,
        )

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device."""
        tensors: dict[str, Any] = {n: x.to(device) for n, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **tensors)


class _Sequence(NamedTuple):
    """One sample's part of a packed batch; ``rows`` count from its first token."""

    tokens: list[int]
    rows: list[int]
    targets: list[int]
    sampling: list[tuple[float, float, int]]


def _fed(request: Request, generation: Generation) -> int:
    """How many tokens the engine fed forward: the last sampled one is not, unless a later turn does."""
    return len(request.input_ids) + max(0, len(generation.output_ids) - 1)


def _lay_out(turns: Sequence[Turn], sample: str) -> _Sequence:
    out = _Sequence([], [], [], [])
    said: tuple[int, ...] = ()
    for index, (request, generation) in enumerate(turns):
        if not request.input_ids:
            raise ValueError(f"{sample}, turn {index} has an empty prompt: nothing precedes its first sampled token")
        if request.input_ids[: len(said)] != said:
            raise ValueError(
                f"{sample}, turn {index}: its prompt does not begin with the turns before it, token by token"
            )
        n, s = len(generation.output_ids), request.sampling
        out.rows.extend(range(len(request.input_ids) - 1, len(request.input_ids) - 1 + n))
        out.targets.extend(generation.output_ids)
        greedy = s.temperature == 0 or s.top_k == 1  # SGLang's own form of greedy
        out.sampling.extend([(1.0, 1.0, 0) if greedy else (s.temperature, s.top_p, s.top_k)] * n)
        said = request.input_ids + tuple(generation.output_ids)
    out.tokens.extend(said[: _fed(*turns[-1])])
    return out
