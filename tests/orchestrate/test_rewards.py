"""A failing reward drops its sample; the built-in ones score as documented."""

import time

import numpy as np
import pytest

from zerokl.orchestrate.data import Task, reasoning_gym
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.rewards import exact_match, length, score
from zerokl.orchestrate.rewards import reasoning_gym as gym_score

TASKS = [Task(i, "p", fields={"answer": "4"}) for i in range(8)]


def test_failures_are_dropped_and_counted_never_zero():
    answers = iter([1, 0.5, float("nan"), float("inf"), "1", None, True, ZeroDivisionError()])

    def reward(*_):
        value = next(answers)
        if isinstance(value, Exception):
            raise value
        return value

    scores = score(reward, TASKS, ["x"] * 8, timeout_s=5)
    assert scores.values == (1.0, 0.5, None, None, None, None, None, None)
    assert len(scores.errors) == 6
    assert "task 7: ZeroDivisionError" in scores.errors[-1]


def test_numpy_numbers_are_numbers():
    assert score(lambda *_: np.float32(0.25), TASKS[:1], ["x"], timeout_s=5).values == (0.25,)


def test_a_hanging_reward_hits_its_deadline():
    with pytest.raises(RunError, match="hangs at task 0"):
        score(lambda *_: time.sleep(3), TASKS, ["x"] * 8, timeout_s=0.1)


def test_built_in_rewards():
    source = reasoning_gym(0, task="chain_sum", min_terms=2, max_terms=2, max_digits=1)
    task = source(0)
    assert gym_score(task, f" {task.fields['answer']}\n") == 1.0
    assert gym_score(task, "no idea") == 0.0
    assert (exact_match(TASKS[0], " 4 "), exact_match(TASKS[0], "5")) == (1.0, 0.0)
    assert (length(TASKS[0], "x" * 32), length(TASKS[0], ""), length(TASKS[0], "x" * 100)) == (1.0, 0.0, 0.0)
