"""Where tasks come from. A source answers any index, always with the same task: that is what makes a resume exact."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from zerokl.orchestrate.errors import UserError

Messages: TypeAlias = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """One prompt and what its reward needs.

    ``prompt``: text or chat messages, or None where ``input_ids`` is given. ``fields`` may be used in the recipe's
    template and by the reward. ``source`` is whatever the reward wants to ask back (never printed). ``where`` is how
    messages name the task.
    """

    index: int
    prompt: str | Messages | None
    input_ids: tuple[int, ...] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    source: Any = field(default=None, repr=False, compare=False)
    where: str = ""

    @property
    def name(self) -> str:
        return self.where or f"task {self.index}"


class Source(Protocol):
    """An endless, repeatable supply of tasks."""

    def __call__(self, index: int) -> Task: ...


@dataclass(frozen=True)
class ReasoningGym:
    """Procedurally generated tasks of one reasoning-gym dataset; the task at an index depends on the seed alone."""

    task: str
    config: dict[str, Any]
    seed: int

    @cached_property
    def dataset(self) -> Any:
        import reasoning_gym as gym

        # reasoning-gym draws task i with seed + i: spread the seeds so that two runs do not share shifted tasks
        seed = random.Random(self.seed).randrange(2**31)
        try:
            return gym.create_dataset(self.task, seed=seed, size=2**31, **self.config)
        except (ValueError, TypeError, AssertionError) as error:
            raise UserError(f"reasoning-gym refuses task {self.task!r} with {self.config}: {error}") from error

    def __call__(self, index: int) -> Task:
        entry = self.dataset[index]
        plain = {k: v for k, v in entry["metadata"].items() if isinstance(v, str | int | float)}
        return Task(index, entry["question"], fields={**plain, "answer": entry["answer"]}, source=(self.dataset, entry))


def reasoning_gym(seed: int, *, task: str, **config: Any) -> Source:
    """Tasks of the named reasoning-gym dataset; `config` is that dataset's own (e.g. ``min_terms = 2``)."""
    source = ReasoningGym(task, config, seed)
    source(0)  # fail here, not in the first step
    return source


@dataclass(frozen=True)
class JsonLines:
    """The tasks of a file in an order shuffled anew for each pass over it."""

    tasks: tuple[Task, ...]
    seed: int

    def __call__(self, index: int) -> Task:
        epoch, place = divmod(index, len(self.tasks))
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        task = self.tasks[order[place]]
        return replace(task, index=index)


def jsonl(seed: int, *, path: str) -> Source:
    """Tasks from a JSON-lines file: `prompt` or `input_ids` each, every other key becomes a field."""
    return JsonLines(tuple(read_jsonl(Path(path).expanduser())), seed)


def read_jsonl(path: Path) -> list[Task]:
    """All tasks of a JSON-lines file; blank lines are skipped. Raises UserError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "give a JSON-lines file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", "save it as UTF-8") from error
    tasks = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise UserError(f"{path} holds no prompt", 'write one JSON object a line, e.g. {"prompt": "What is 2 + 3?"}')
    return tasks


def _parse(path: Path, number: int, line: str) -> Task:
    where = f"{path}, line {number}"

    def bad(why: str) -> UserError:
        return UserError(
            f"{path}, line {number}: {why}", 'each line: {"prompt": text or messages} or {"input_ids": [...]}'
        )

    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise bad(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad("not a JSON object")
    prompt, ids = value.pop("prompt", None), value.pop("input_ids", None)
    if (prompt is None) == (ids is None):
        raise bad("needs either prompt or input_ids")
    if ids is not None:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise bad("input_ids must be a non-empty list of token ids")
        return Task(number - 1, None, tuple(ids), value, where=where)
    if isinstance(prompt, list):
        if not prompt or not all(_is_message(m) for m in prompt):
            raise bad('chat messages must be [{"role": text, "content": text}, ...]')
    elif not isinstance(prompt, str) or not prompt:
        raise bad("prompt must be non-empty text or chat messages")
    return Task(number - 1, prompt, None, value, where=where)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
