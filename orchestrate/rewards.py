"""What a response is worth. A reward that fails says nothing about the response: the sample is dropped and counted."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zerokl.orchestrate.data import Task
from zerokl.orchestrate.errors import RunError, UserError

Reward = Callable[[Task, str], float]


def reasoning_gym(task: Task, response: str) -> float:
    """The score that reasoning-gym itself gives to the stripped response, in [0, 1]."""
    dataset, entry = task.source
    return float(dataset.score_answer(response.strip(), entry))


def exact_match(task: Task, response: str, *, field: str = "answer") -> float:
    """1 where the stripped response equals the task's field, else 0."""
    return float(response.strip() == str(task.fields[field]).strip())


def length(task: Task, response: str, *, target: int = 32) -> float:  # noqa: ARG001 - the reward signature
    """1 for a response of `target` characters, falling linearly to 0: for smoke tests with random models."""
    return max(0.0, 1.0 - abs(len(response) - target) / target)


@dataclass(frozen=True)
class Scores:
    """One value per response; None where the sample is dropped, with the reason in `errors`."""

    values: tuple[float | None, ...]
    errors: tuple[str, ...]


def score(reward: Reward, tasks: Sequence[Task], responses: Sequence[str], *, timeout_s: float) -> Scores:
    """Score all responses. Raises RunError when they take longer than `timeout_s` together.

    A reward that raises, or returns something that is no finite number, drops its sample.
    """
    values: list[float | None] = []
    errors: list[str] = []

    def work() -> None:
        for task, response in zip(tasks, responses, strict=True):
            try:
                values.append(_number(reward(task, response)))
            except Exception as error:  # noqa: BLE001 - user code: any failure drops the sample and is counted
                values.append(None)
                errors.append(f"{task.name}: {type(error).__name__}: {error}")

    # a thread, because user code that hangs cannot be interrupted any other way within this process
    thread = threading.Thread(target=work, name="rewards", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        at = len(values)
        raise RunError(f"the reward did not return within {timeout_s:g} s; it hangs at {tasks[at].name}")
    return Scores(tuple(values), tuple(errors))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"the reward returned {value!r}, not a finite number")
    return float(value)
