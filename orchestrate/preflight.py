"""Everything that can be known before an engine starts: a run that begins does not fail for what its recipe says."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from zerokl.alignment.architectures import Architecture
from zerokl.alignment.megatron.layout import Layout, LayoutError
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.orchestrate import models
from zerokl.orchestrate.callables import load_architecture, load_callable
from zerokl.orchestrate.config import Config
from zerokl.orchestrate.data import Source
from zerokl.orchestrate.errors import UserError
from zerokl.orchestrate.rewards import Reward
from zerokl.orchestrate.samples import plan
from zerokl.orchestrate.tokens import Tokenizer
from zerokl.weightsync.place import available
from zerokl.weightsync.topology import AUTO, TRANSPORTS, lacking

T = TypeVar("T")


def trainer_layout(config: Config) -> Layout:
    """The layout of all trainer ranks. Raises LayoutError for sizes that contradict each other."""
    sizes = config.train.parallel.model_dump(exclude={"data"})
    return Layout(segments=config.model.segments, **sizes)


@dataclass(frozen=True)
class Prepared:
    """A checked run: the resolved recipe and what it names, loaded."""

    config: Config
    model: Path
    model_config: ModelConfig
    architecture: Architecture | None
    source: Source
    reward: Reward
    tokenizer: Tokenizer


def prepare(config: Config, base: Path) -> Prepared:
    """Resolve model, data source and reward and encode the first step's prompts.

    `base`: the recipe's folder, for `file.py:function`. Raises one UserError with every problem found.
    """
    problems: list[UserError] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except UserError as error:
            problems.append(error)
            return None

    config = _absolute(config, base)
    attempt(lambda: check_transport(config.weightsync.transport))
    named = config.model.architecture
    architecture = attempt(partial(load_architecture, named, base)) if named else None
    model = attempt(lambda: models.resolve(config.model.name, architecture))
    model_config = attempt(partial(models.check, model, architecture)) if model else None
    if model_config:
        attempt(partial(_check_lengths, config, model_config))
        attempt(partial(_check_routing, config, model_config))
        attempt(partial(_check_layout, config, model_config))
    source = attempt(lambda: _source(config, base))
    reward = attempt(
        lambda: load_callable(config.reward.function, positional=2, options=config.reward.options, base=base)
    )
    tokenizer = Tokenizer(model, model_config.vocab_size) if model and model_config else None
    if source and tokenizer:
        attempt(partial(plan, config, source, tokenizer, 1))
    if problems or not (model and model_config and source and reward and tokenizer):
        raise UserError("\n".join(str(problem) for problem in problems))
    return Prepared(config, model, model_config, architecture, source, reward, tokenizer)


def _source(config: Config, base: Path) -> Source:
    make = load_callable(config.data.source, positional=1, options=config.data.options, base=base)
    source = make(config.run.seed)
    if not callable(source):
        raise UserError(f"{config.data.source} returned {type(source).__name__}", "return a callable: index -> Task")
    return source


def check_transport(name: str) -> None:
    """Raise UserError for a transport that is not known, or lacks what it needs here, where both sides run."""
    if name not in (AUTO, *TRANSPORTS):
        raise UserError(f"transport {name!r} is not known", f"known are {', '.join((AUTO, *TRANSPORTS))}")
    if name != AUTO and not available(name):
        problem = lacking(name)
        raise UserError(problem.cause, problem.remedy)


def _check_lengths(config: Config, model: ModelConfig) -> None:
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > model.max_position_embeddings:
        raise UserError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the model's "
            f"{model.max_position_embeddings} positions",
            "lower one of them",
        )


def _check_routing(config: Config, model: ModelConfig) -> None:
    if config.train.routing_replay != "off" and model.moe is None:
        raise UserError(f"train.routing_replay = {config.train.routing_replay}: {model.architecture} routes nothing",
                        "set it to off")  # fmt: skip


def _check_layout(config: Config, model: ModelConfig) -> None:
    segments, ranks, parallel = config.model.segments, config.rollout.tensor_parallel, config.train.parallel
    try:
        Layout(segments=segments).check(model)
        Layout(tensor=ranks, segments=segments).check(model)
    except LayoutError as error:
        raise UserError(
            f"model.segments = {segments}, rollout.tensor_parallel = {ranks}: {error}",
            "segments: a multiple of the ranks by which the model's sizes divide",
        ) from error
    try:
        layout = trainer_layout(config)
        layout.check(model)
        layout.check_world(parallel.ranks)
    except LayoutError as error:
        raise UserError(f"train.parallel of {parallel.ranks} ranks: {error}", "choose sizes that divide") from error


def _absolute(config: Config, base: Path) -> Config:
    """Names that are relative to the recipe's folder, made absolute: the resolved recipe works from anywhere."""

    def absolute(name: str) -> str:
        return os.path.normpath(base / name) if ".py:" in name else name

    data = config.data.model_copy(update={"source": absolute(config.data.source)})
    reward = config.reward.model_copy(update={"function": absolute(config.reward.function)})
    model = config.model
    if model.architecture is not None:
        model = model.model_copy(update={"architecture": absolute(model.architecture)})
    if Path(model.name).expanduser().is_dir():
        model = model.model_copy(update={"name": str(Path(model.name).expanduser().resolve())})
    return config.model_copy(update={"data": data, "reward": reward, "model": model})
