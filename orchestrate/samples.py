"""From tasks to requests, and from samples to micro-batches: everything that decides what a step holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from zerokl.alignment.types import Generation, Request, SamplingParams
from zerokl.orchestrate.config import Config
from zerokl.orchestrate.data import Source, Task
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.tokens import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One response: its task (None where only the tokens matter), what was asked, what came back, its advantage."""

    task: Task | None
    request: Request
    generation: Generation
    advantage: float = 0.0


def sampling_seed(run_seed: int, step: int, index: int) -> int:
    """The seed of response `index` of a step: fixed by these three numbers, so a resumed run samples the same."""
    digest = hashlib.blake2b(f"{run_seed}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33  # 31 bits: fits every engine's integer


def plan(config: Config, source: Source, tokenizer: Tokenizer, step: int) -> tuple[list[Task], list[Request]]:
    """The step's tasks and requests, one per response: each prompt `group_size` times in a row."""
    rollout = config.rollout
    tasks: list[Task] = []
    requests: list[Request] = []
    for offset in range(rollout.prompts_per_step):
        task = source((step - 1) * rollout.prompts_per_step + offset)
        ids = tokenizer.encode(task, template=config.data.template, longest=rollout.max_prompt_tokens)
        for _ in range(rollout.group_size):
            sampling = SamplingParams(
                max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                seed=sampling_seed(config.run.seed, step, len(requests)),
                stop_token_ids=tokenizer.end,
            )
            tasks.append(task)
            requests.append(Request(ids, sampling))
    return tasks, requests


def microbatches(samples: Sequence[Sample], limit: int) -> list[list[int]]:
    """Indices of `samples`, in order, cut into runs of at most `limit` packed tokens (a longer one stands alone)."""
    batches: list[list[int]] = []
    used = limit + 1
    for index, sample in enumerate(samples):
        length = len(sample.request.input_ids) + len(sample.generation.output_ids) - 1
        if used + length > limit:
            batches.append([])
            used = 0
        batches[-1].append(index)
        used += length
    return batches


def dealt(batches: Sequence[Sequence[int]], copies: int, least: int = 1) -> list[list[list[int]]]:
    """The micro-batches of each of ``copies`` replicas, in order, as many for each and ``least`` at least; where they
    do not come out even, the ones with the most samples are halved. Raises RunError for too few samples."""
    cut = [list(batch) for batch in batches]
    while len(cut) % copies or len(cut) < copies * least:
        at = max(range(len(cut)), key=lambda index: len(cut[index]))
        half = len(cut[at]) // 2
        if half == 0:
            raise RunError(
                f"{len(cut)} samples cannot be dealt to {copies} data-parallel replicas, {least} micro-batches or more "
                "to each; take more prompts a step, or fewer replicas"
            )
        cut[at : at + 1] = [cut[at][:half], cut[at][half:]]
    return [cut[replica::copies] for replica in range(copies)]
