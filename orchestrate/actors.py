"""The actors as the driver sees them: started together, called with deadlines, stopped in order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerokl.alignment.architectures import Architecture
from zerokl.alignment.megatron.layout import Layout
from zerokl.alignment.sglang.config import EngineConfig, Transfer
from zerokl.orchestrate.cluster import Waiting, wait, wait_all
from zerokl.orchestrate.config import Config
from zerokl.orchestrate.errors import RunError
from zerokl.orchestrate.preflight import Prepared, trainer_layout
from zerokl.orchestrate.trainer import Member
from zerokl.orchestrate.weights import Meeting

_CLOSE_TIMEOUT_S = 30.0


def cores(threads: int | None) -> int:
    """The number of threads to use: as configured, else every core this process may run on."""
    return threads or len(os.sched_getaffinity(0))


def claimed(config: Config) -> int:
    """CPUs that a rollout and the trainer's ranks claim together."""
    return cores(config.rollout.threads) + config.train.parallel.ranks * rank_threads(config)


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
        threads=cores(rollout.threads),
        transfer=transfer,
    )


def meeting_of(config: Config, scratch: Path) -> Meeting:
    """Where a run's weight transfers meet: the weightsync table, in a new folder below ``scratch``."""
    settings = config.weightsync
    return Meeting.in_folder(
        scratch,
        transport=settings.transport,
        receivers=config.rollout.tensor_parallel,
        senders=config.train.parallel.ranks,
        floor_gb_per_s=settings.floor_gb_per_s,
    )


@dataclass(frozen=True)
class Places:
    """Where actors write: logs that stay, and a scratch folder that goes with the cluster."""

    logs: Path
    scratch: Path


class Actors:
    """A rollout actor and the trainer's ranks on one model."""

    def __init__(self, prepared: Prepared, places: Places, waiting: Waiting, *, stock: bool = False) -> None:
        """Start all and wait until they are ready. `stock`: the engines' own kernels, and no optimizer; one rank."""
        import ray

        from zerokl.orchestrate.rollout import Rollout
        from zerokl.orchestrate.trainer import Trainer

        config, model, architecture = prepared.config, prepared.model, prepared.architecture
        self._waiting, self._config = waiting, config
        self.logs = places.logs
        prefix = "stock-" if stock else ""
        timeout, ranks = config.run.start_timeout_s, 1 if stock else config.train.parallel.ranks
        # Ray counts CPUs for scheduling only; it also hands them to OpenMP as the number of threads
        self.rollout = ray.remote(num_cpus=cores(config.rollout.threads))(Rollout).remote()
        self.trainers = [ray.remote(num_cpus=rank_threads(config))(Trainer).remote() for _ in range(ranks)]
        meeting = None if stock else meeting_of(config, places.scratch)  # the control's weights stay as they are
        transfer = None if meeting is None else meeting.transfer()
        engine = engine_config(config, model, architecture=architecture, stock=stock, transfer=transfer)
        rollout_log = places.logs / f"{prefix}rollout.log"
        started = [self.rollout.start.remote(engine, rollout_log, places.scratch, timeout)]
        rendezvous = places.scratch / "trainer-ranks" if ranks > 1 else None
        for rank, trainer in enumerate(self.trainers):
            log = f"{prefix}trainer.log" if rank == 0 else f"trainer-{rank}.log"
            started.append(
                trainer.start.remote(
                    model,
                    config.train.model_copy(update={"threads": rank_threads(config)}),
                    places.logs / log,
                    layout=Layout() if stock else trainer_layout(config),
                    member=Member(rank, ranks, rendezvous),
                    architecture=architecture,
                    stock=stock,
                    meeting=meeting,
                    engine_ranks=engine.tensor_parallel,
                )
            )
        what = "engine and trainer to start"
        (of_engine, *of_trainers) = self.wait_all(started, what, timeout)
        self.manifests: dict[str, Any] = {"engine": of_engine[0], "trainer": of_trainers[0][0]}
        self.digests: dict[str, dict[str, str]] = {"engine": of_engine[1], "trainer": of_trainers[0][1]}

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

    def check_digests(self, engine: dict[str, str], trainer: dict[str, str], when: str) -> None:
        """Raise RunError naming the tensors that differ between the two sides."""
        names = sorted(n for n in engine.keys() | trainer.keys() if engine.get(n) != trainer.get(n))
        if names:
            raise RunError(f"weights differ between engine and trainer {when}: {', '.join(names[:5])} ({len(names)})")

    def close(self) -> None:
        """Stop the engine's child process; Ray ends the actors themselves."""
        self.wait(self.rollout.close.remote(), "the engine to stop", _CLOSE_TIMEOUT_S)
        import ray

        for actor in (self.rollout, *self.trainers):
            ray.kill(actor)
