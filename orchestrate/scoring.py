"""Scoring what an engine sampled with the training forward, packed as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from zerokl.alignment.routing_replay import check_record
from zerokl.alignment.types import Generation, PackedBatch, Request
from zerokl.orchestrate.samples import Sample, microbatches

if TYPE_CHECKING:
    from zerokl.alignment.megatron.policy import MegatronPolicy

_MICROBATCH_TOKENS = 2048


def score(policy: MegatronPolicy, requests: Sequence[Request], generations: Sequence[Generation]) -> list[np.ndarray]:
    """fp32 [n] per request: the sampled tokens' log-probabilities by the training forward, packed as in training.

    Raises RoutingError, naming the request, where the policy replays routing and a record does not fit.
    """
    samples = [Sample(None, r, g) for r, g in zip(requests, generations, strict=True)]
    check_routing(policy, samples)
    scored: list[np.ndarray] = []
    # stock Megatron pads sequences to rows and keeps every logit: one at a time, or it needs tens of gigabytes
    for batch in microbatches(samples, 1 if policy.stock else _MICROBATCH_TOKENS):
        packed = PackedBatch.pack([requests[i] for i in batch], [generations[i] for i in batch])
        values = policy.logprobs(packed).detach().numpy()
        scored += np.split(values, np.cumsum([len(generations[i].output_ids) for i in batch])[:-1])
    return scored


def check_routing(policy: MegatronPolicy, samples: Sequence[Sample]) -> None:
    """Raise RoutingError, naming the sample, for a routing record that the policy's replay could not follow."""
    if policy.replay == "off" or policy.config.moe is None:
        return
    for index, sample in enumerate(samples):
        tokens = len(sample.request.input_ids) + len(sample.generation.output_ids) - 1
        check_record(sample.generation.routed_experts, policy.config.moe.router, tokens, f"sample {index}")
