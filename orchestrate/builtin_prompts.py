"""The prompts `zerokl verify` uses by default: fixed text that reaches every path of the rollout engine.

Short and long prompts of many lengths, one longer than two prefill chunks, pairs that share a long prefix and arrive
one after the other (a hit in the prefix cache), and arrivals spread over time, so that prompts are prefilled while
others decode and the decoding batch grows from 1 to the engine's limit and shrinks again.
"""

from __future__ import annotations

import random

from zerokl.orchestrate.data import Task
from zerokl.orchestrate.tokens import Tokenizer

COUNT = 36
LONG = 640  # tokens of the longest prompt: more than two prefill chunks
_EVERY_S = 0.25

_SUBJECTS = ("The river", "A small robot", "My neighbour", "The night train", "An old map", "Every second number")
_VERBS = ("crosses", "remembers", "counts", "repairs", "almost forgets", "is longer than")
_NOTHING: tuple[int, ...] = ()
_OBJECTS = ("the bridge", "seven apples", "a quiet village", "the answer", "its own shadow", "3 * 14 + 2")


def make(tokenizer: Tokenizer, *, longest: int) -> list[tuple[tuple[int, ...], float]]:
    """(token ids, arrival in seconds) of every prompt; none longer than `longest`.

    A model without a tokenizer gets fixed pseudo-random token ids instead of text.
    """
    rng = random.Random(20_240_229)
    lengths = [LONG, 1, 2, 300, *(4 + 5 * i for i in range(COUNT - 8))]
    prompts = [_prompt(tokenizer, rng, min(length, longest)) for length in lengths]
    # continuations of prompts that were served before: their beginnings are in the cache
    for of in (0, 3, 3, 20):
        prompts.append((*prompts[of][: longest - 1], prompts[1][0]))
    late = len(lengths)
    return [(ids, _EVERY_S * (i // 2) + (2.0 if i >= late else 0.0)) for i, ids in enumerate(prompts)]


def _prompt(tokenizer: Tokenizer, rng: random.Random, length: int) -> tuple[int, ...]:
    """Exactly `length` tokens (at least 1)."""
    if not tokenizer.exists:
        return tuple(rng.randrange(tokenizer.vocab_size) for _ in range(length))
    text, ids = "", _NOTHING
    while len(ids) < length:
        text += f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}. "
        ids = tokenizer.encode(Task(0, text), template=None, longest=10**6)
    return ids[:length]
