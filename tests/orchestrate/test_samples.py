"""What a step holds is fixed by recipe, seed and step number."""

import numpy as np
import pytest

from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams
from zerokl.orchestrate.config import Config
from zerokl.orchestrate.data import Task
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.samples import Sample, dealt, microbatches, plan, sampling_seed


class Letters:
    """A tokenizer whose tokens are the letters' codes."""

    end = (2,)

    def encode(self, task, **_):
        return tuple(map(ord, task.prompt))


CONFIG = Config.model_validate(
    {
        "model": {"name": "m"},
        "train": {"steps": 3},
        "data": {"source": "a.b"},
        "reward": {"function": "a.b"},
        "rollout": {"prompts_per_step": 3, "group_size": 2, "temperature": 0.5},
    }
)


def source(index):
    return Task(index, f"p{index}")


def test_a_step_holds_its_own_prompts_each_group_size_times():
    tasks, requests = plan(CONFIG, source, Letters(), 2)
    assert [t.index for t in tasks] == [3, 3, 4, 4, 5, 5]
    assert all(r.sampling.temperature == 0.5 and r.sampling.stop_token_ids == (2,) for r in requests)
    assert len({r.sampling.seed for r in requests}) == 6
    assert plan(CONFIG, source, Letters(), 2)[1] == requests
    assert not {r.sampling.seed for r in plan(CONFIG, source, Letters(), 3)[1]} & {r.sampling.seed for r in requests}


def test_seeds_depend_on_run_step_and_index():
    seeds = {sampling_seed(run, step, index) for run in range(5) for step in range(20) for index in range(50)}
    assert len(seeds) > 4990
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(1, 2, 3) == sampling_seed(1, 2, 3)


def sample(prompt, response):
    logprobs = np.zeros(response, np.float32)
    request = Request(tuple(range(1, prompt + 1)), SamplingParams())
    return Sample(None, request, Generation(tuple(range(response)), logprobs, logprobs, "stop", "0"))


def test_microbatches_keep_order_and_limit():
    samples = [sample(4, 3), sample(10, 1), sample(2, 2), sample(30, 9), sample(1, 1)]
    batches = microbatches(samples, 16)
    assert batches == [[0, 1], [2], [3], [4]]  # 6 + 10 tokens, 3, 38 (alone), 1
    for batch in batches:
        packed = PackedBatch.pack([samples[i].request for i in batch], [samples[i].generation for i in batch])
        assert len(packed.tokens) <= 16 or len(batch) == 1
    assert microbatches([], 16) == []


def test_replicas_get_equally_many_microbatches():
    assert dealt([[0, 1], [2], [3]], 1) == [[[0, 1], [2], [3]]]
    assert dealt([[0, 1, 2], [3], [4, 5]], 2) == [[[0], [3]], [[1, 2], [4, 5]]]
    assert dealt([[0, 1, 2, 3]], 2, least=2) == [[[0], [2]], [[1], [3]]]
    with pytest.raises(RunError, match="3 samples cannot be dealt to 2 data-parallel replicas, 2 micro"):
        dealt([[0, 1, 2]], 2, least=2)
