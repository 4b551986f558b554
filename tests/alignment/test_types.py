"""Packed batches: what the trainer sees of single responses and of conversations."""

import numpy as np
import pytest
import torch

from zerokl.alignment.routing import RoutingError
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams


def turn(prompt, response, records=None, **sampling):
    zeros = np.zeros(len(response), np.float32)
    record = None if records is None else np.full((records, 1, 2), [3, 4], np.uint8)
    generation = Generation(tuple(response), zeros, zeros, "stop", "0", routed_experts=record)
    return Request(tuple(prompt), SamplingParams(**sampling)), generation


def test_a_conversation_is_one_sequence_with_every_turn_scored():
    first = turn([1, 2, 3], [50, 51], temperature=0.5)
    second = turn([1, 2, 3, 50, 51, 7, 8], [60, 61, 62], top_k=5)
    alone = turn([9], [70])
    batch = PackedBatch.pack_turns([[alone], [first, second]])
    assert batch.tokens.tolist() == [9, 1, 2, 3, 50, 51, 7, 8, 60, 61]
    assert batch.positions.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.cu_seqlens.tolist() == [0, 1, 10]
    assert batch.rows.tolist() == [0, 3, 4, 7, 8, 9]  # the tokens before the sampled ones
    assert batch.targets.tolist() == [70, 50, 51, 60, 61, 62]
    assert batch.temperature.tolist() == [1, 0.5, 0.5, 1, 1, 1]
    assert batch.top_k.tolist() == [0, 0, 0, 5, 5, 5]
    assert batch.sequence.tolist() == [0, 1, 1, 1, 1, 1]
    assert batch.routed_experts is None


def test_one_turn_each_is_what_pack_makes():
    pairs = [turn([1, 2], [5, 6, 7], temperature=0.0), turn([3], []), turn([4, 4, 4], [8], top_p=0.5)]
    packed, turns = PackedBatch.pack(*zip(*pairs, strict=True)), PackedBatch.pack_turns([[pair] for pair in pairs])
    for name, value in vars(packed).items():
        other = getattr(turns, name)
        assert value is other or torch.equal(value, other), name
    assert packed.tokens.tolist() == [1, 2, 5, 6, 3, 4, 4, 4]
    assert packed.rows.tolist() == [1, 2, 3, 7]


def test_records_of_turns_cover_the_sequence():
    first, second = turn([1, 2, 3], [50, 51], records=4), turn([1, 2, 3, 50, 51, 7], [60], records=6)
    assert PackedBatch.pack_turns([[first, second]]).routed_experts.shape == (6, 1, 2)
    with pytest.raises(RoutingError, match="sample 0, turn 1: a routing record of 5 tokens for 6 tokens"):
        PackedBatch.pack_turns([[first, turn([1, 2, 3, 50, 51, 7], [60], records=5)]])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([[turn([1], [2])], []], "a turn in each"),
        ([[turn([], [2])]], "sample 0, turn 0 has an empty prompt"),
        ([[turn([1], [2]), turn([1, 3], [4])]], "sample 0, turn 1: its prompt does not begin with the turns before it"),
        ([[turn([1, 5], [2]), turn([1], [4])]], "sample 0, turn 1: its prompt does not begin"),
    ],
)
def test_what_is_no_conversation_is_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.pack_turns(samples)
