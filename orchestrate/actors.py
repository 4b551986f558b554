"""The actors as the driver sees them: started together, called with deadlines, stopped in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zerokl.alignment.architectures import Architecture
from zerokl.alignment.megatron.layout import Layout
from zerokl.alignment.sglang.config import EngineConfig, Transfer
from zerokl.orchestrate.cluster import Waiting, wait, wait_all
from zerokl.orchestrate.config import Config, ParallelTable
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.hosts import Host
from zerokl.orchestrate.preflight import Prepared, trainer_layout
from zerokl.orchestrate.trainer import Member
from zerokl.orchestrate.weights import Meeting

if TYPE_CHECKING:
    from zerokl.alignment.types import Generation, Request

_CLOSE_TIMEOUT_S = 30.0

T = TypeVar("T")


def cores(threads: int | None) -> int:
    """The number of threads to use: as configured, else every core this process may run on."""
    return threads or len(os.sched_getaffinity(0))


def claims(config: Config) -> list[int]:
    """CPUs that each engine, then each of the trainer's ranks claims."""
    return [engine_threads(config)] * config.rollout.engines + [rank_threads(config)] * config.train.parallel.ranks


def engine_threads(config: Config) -> int:
    """Threads of one engine."""
    return config.rollout.threads or max(1, cores(None) // config.rollout.engines)


def rank_threads(config: Config) -> int:
    """Threads of one trainer rank."""
    return config.train.threads or max(1, cores(None) // config.train.parallel.ranks)


def engine_config(
    config: Config,
    model: Path,
    *,
    architecture: Architecture | None = None,
    stock: bool = False,
    transfer: Transfer | None = None,
) -> EngineConfig:
    """The rollout table as the engine's own configuration."""
    rollout = config.rollout
    return EngineConfig(
        model_path=str(model),
        architecture=architecture,
        stock=stock,
        capture_experts=config.train.routing_replay != "off" and not stock,
        context_length=rollout.max_prompt_tokens + rollout.max_new_tokens,
        max_running_requests=rollout.max_running_requests,
        max_total_tokens=rollout.kv_cache_tokens,
        chunked_prefill_size=rollout.chunked_prefill_tokens,
        segments=1 if stock else config.model.segments,
        tensor_parallel=1 if stock else rollout.tensor_parallel,
        threads=engine_threads(config),
        transfer=transfer,
    )


def meeting_of(config: Config, scratch: Path, host: str = "") -> Meeting:
    """Where a run's weight transfers meet: the weightsync table, in a new folder below ``scratch``; ``host``: the
    coordinator's address, if the participants are on several hosts."""
    settings = config.weightsync
    return Meeting.in_folder(
        scratch,
        transport=settings.transport,
        receivers=config.rollout.tensor_parallel * config.rollout.engines,
        senders=config.train.parallel.ranks,
        floor_gb_per_s=settings.floor_gb_per_s,
        host=host,
    )


def shares(requests: Sequence[T], engines: int, group: int) -> list[Sequence[T]]:
    """The requests of each engine: whole groups of ``group``, one after the other, as equally many as can be."""
    groups = -(-len(requests) // group)
    ends = [groups * (engine + 1) // engines * group for engine in range(engines)]
    return [requests[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Places:
    """Where actors write: logs that stay, and a scratch folder that goes with the cluster; ``joined``: that is a
    running one, of perhaps several hosts, which all see these folders."""

    logs: Path
    scratch: Path
    joined: bool = False


class Actors:
    """Engines' actors and the trainer's ranks on one model."""

    def __init__(self, prepared: Prepared, places: Places, waiting: Waiting, *, stock: bool = False) -> None:
        """Start all and wait until they are ready. `stock`: the engines' own kernels, and no optimizer; one of each."""
        config = prepared.config
        if stock:
            alone = {"engines": 1}, {"parallel": ParallelTable()}
            rollout, train = config.rollout.model_copy(update=alone[0]), config.train.model_copy(update=alone[1])
            config = config.model_copy(update={"rollout": rollout, "train": train})
        self._config, self._prepared, self._waiting = config, prepared, waiting
        self.logs, self._places, self._stock = places.logs, places, stock
        self._claim()
        shared = [places.scratch, prepared.model]
        what = f"{len(self.rollouts)} engines and {len(self.trainers)} trainer ranks to find a place"
        found = self._on_all("host", what, shared)
        ours, theirs = found[: len(self.rollouts)], found[len(self.rollouts) :]
        address = theirs[0].address if places.joined else ""
        # the control's weights stay as they are
        meeting = None if stock else meeting_of(config, places.scratch, address)
        started = [self._start_engine(number, host, meeting) for number, host in enumerate(ours)]
        started += [self._start_trainer(rank, host, meeting) for rank, host in enumerate(theirs)]
        ready = self.wait_all(started, "engine and trainer to start", config.run.start_timeout_s)
        of_engines, (of_trainer, *_) = ready[: len(self.rollouts)], ready[len(self.rollouts) :]
        self.manifests: dict[str, Any] = {"engine": of_engines[0][0], "trainer": of_trainer[0]}
        for _, digests in () if stock else of_engines:
            _check_digests(digests, of_trainer[1])

    def _claim(self) -> None:
        """Create the actors, all at once or none: each claims the CPUs of its threads on one host."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from zerokl.orchestrate.rollout import Rollout
        from zerokl.orchestrate.trainer import Trainer

        # Ray counts CPUs for scheduling only; it also hands them to OpenMP as the number of threads
        claimed = claims(self._config)
        self._group = ray.util.placement_group([{"CPU": cpus} for cpus in claimed])
        actors = []
        for number, cpus in enumerate(claimed):
            kind = Rollout if number < self._config.rollout.engines else Trainer
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
            actors.append(ray.remote(num_cpus=cpus, scheduling_strategy=place)(kind).remote())
        engines = self._config.rollout.engines
        self.rollouts, self.trainers = actors[:engines], actors[engines:]

    def _start_engine(self, number: int, host: Host, meeting: Meeting | None) -> Any:
        transfer = None if meeting is None else meeting.on(host.interface).transfer(number)
        prepared, stock = self._prepared, self._stock
        settings = engine_config(
            self._config, prepared.model, architecture=prepared.architecture, stock=stock, transfer=transfer
        )
        scratch, timeout = None if self._places.joined else self._places.scratch, self._config.run.start_timeout_s
        return self.rollouts[number].start.remote(settings, self._log("rollout", number), scratch, timeout)

    def _start_trainer(self, rank: int, host: Host, meeting: Meeting | None) -> Any:
        config, ranks = self._config, len(self.trainers)
        rendezvous = self._places.scratch / "trainer-ranks" if ranks > 1 else None
        return self.trainers[rank].start.remote(
            self._prepared.model,
            config.train.model_copy(update={"threads": rank_threads(config)}),
            self._log("trainer", rank),
            layout=Layout() if self._stock else trainer_layout(config),
            member=Member(rank, ranks, rendezvous, host.interface),
            architecture=self._prepared.architecture,
            stock=self._stock,
            meeting=None if meeting is None else meeting.on(host.interface),
            engine_ranks=config.rollout.tensor_parallel if not self._stock else 1,
        )

    def _log(self, kind: str, number: int) -> Path:
        return self.logs / f"{'stock-' if self._stock else ''}{kind}{f'-{number}' if number else ''}.log"

    @property
    def trainer(self) -> Any:
        """The first rank, which coordinates."""
        return self.trainers[0]

    def every_trainer(self, method: str, what: str, *arguments: Any) -> list[Any]:
        """The results of calling all ranks, which compute together."""
        return self.wait_all([getattr(trainer, method).remote(*arguments) for trainer in self.trainers], what)

    def wait_all(self, references: Sequence[Any], what: str, timeout_s: float | None = None) -> list[Any]:
        """The values of several calls; fails with the first that does."""
        limit = timeout_s or self._config.run.step_timeout_s
        return wait_all(references, what, timeout_s=limit, waiting=self._waiting, logs=self.logs)

    def wait(self, reference: Any, what: str, timeout_s: float | None = None) -> Any:
        """A call's value; the deadline is the recipe's `run.step_timeout_s` unless given."""
        limit = timeout_s or self._config.run.step_timeout_s
        return wait(reference, what, timeout_s=limit, waiting=self._waiting, logs=self.logs)

    def generate(self, requests: Sequence[Request], what: str) -> list[Generation]:
        """The responses, in order; the engines share the prompts. Raises EngineLost if one died."""
        parts = shares(requests, len(self.rollouts), self._config.rollout.group_size)
        limit = self._config.run.step_timeout_s
        called = [r.generate.remote(part, limit) for r, part in zip(self.rollouts, parts, strict=True) if part]
        return [generation for part in self.wait_all(called, what) for generation in part]

    def revive(self) -> int:
        """Start another engine for each that no longer answers; how many."""
        called = [rollout.revive.remote() for rollout in self.rollouts]
        return sum(self.wait_all(called, "the engine to answer", self._config.run.start_timeout_s))

    def close(self) -> None:
        """Stop the engines' child processes; Ray ends the actors themselves."""
        self.wait_all([rollout.close.remote() for rollout in self.rollouts], "the engine to stop", _CLOSE_TIMEOUT_S)
        import ray

        for actor in (*self.rollouts, *self.trainers):
            ray.kill(actor)
        ray.util.remove_placement_group(self._group)

    def _on_all(self, method: str, what: str, *arguments: Any) -> list[Any]:
        called = [getattr(actor, method).remote(*arguments) for actor in (*self.rollouts, *self.trainers)]
        return self.wait_all(called, what, self._config.run.start_timeout_s)


def _check_digests(engine: dict[str, str], trainer: dict[str, str]) -> None:
    """Raise RunError naming the tensors that differ between the two sides."""
    names = sorted(n for n in engine.keys() | trainer.keys() if engine.get(n) != trainer.get(n))
    if names:
        raise RunError(
            f"weights differ between engine and trainer after loading the model: {', '.join(names[:5])} ({len(names)})"
        )
