"""Synchronous GRPO: sample, reward, train, sync the weights, record; a thin driver around the actors."""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zerokl.alignment.mismatch import gap
from zerokl.alignment.types import Generation, Request
from zerokl.alignment.verify import compare
from zerokl.orchestrate import control, report, rewards
from zerokl.orchestrate.actors import Actors, Places, claims
from zerokl.orchestrate.algorithms import grpo
from zerokl.orchestrate.cluster import cluster
from zerokl.orchestrate.errors import EngineLost, RunError, SyncFailed
from zerokl.orchestrate.interrupt import StopRequest
from zerokl.orchestrate.metrics import MetricsFile, StepMetrics, TensorBoard, read
from zerokl.orchestrate.preflight import Prepared
from zerokl.orchestrate.progress import Progress
from zerokl.orchestrate.run_folder import Checkpoint, RunFolder, locate
from zerokl.orchestrate.samples import Sample, plan
from zerokl.orchestrate.trainer import TrainReport, merged
from zerokl.orchestrate.weights import SyncReport

_LIVES = 3
"""How often a step's rollout, or its sync, is tried before the run ends."""


def train(prepared: Prepared, *, resume: bool) -> bool:
    """Run the recipe to its last step; False if a stop was asked for before it. Raises UserError and RunError."""
    config = prepared.config
    with RunFolder(locate(config.run.directory, resume=resume)) as folder, Progress() as progress:
        progress.note(f"run folder: {folder.path}")
        checkpoint = folder.begin(config, resume=resume)
        address = config.cluster.address
        with StopRequest() as stop, cluster(folder.path, cpus=sum(claims(config)), address=address) as scratch:
            places = Places(folder.logs, scratch, joined=bool(address))
            finished = _steps(prepared, folder, places, progress, checkpoint, stop)
            if finished and config.control.enabled and not (folder.path / report.CONTROL).exists():
                control.measure(prepared, folder, places, progress)
        if read(folder.path):
            page, _ = report.write(folder.path)
            progress.note(f"report: {page}")
    return finished


def _steps(
    prepared: Prepared,
    folder: RunFolder,
    places: Places,
    progress: Progress,
    checkpoint: Checkpoint | None,
    stop: StopRequest,
) -> bool:
    """All steps after the checkpoint; whether the last one was reached."""
    config = prepared.config
    done = checkpoint.step if checkpoint else 0
    if done >= config.train.steps and (folder.path / "model").is_dir():
        progress.note(f"all {done} steps are done")
        return True
    shutil.rmtree(folder.path / "model", ignore_errors=True)  # of an earlier, shorter end of this run
    sinks: list[Any] = [MetricsFile(folder.path, keep_through=done)]
    if config.run.tensorboard:
        sinks.append(TensorBoard(folder.path))
    driver = Driver(prepared, folder, places, progress)
    try:
        driver.start(checkpoint)
        while done < config.train.steps and not stop:
            metrics = driver.step(done + 1)
            done = metrics.step
            for sink in sinks:
                sink.append(metrics)
            progress.step(metrics, config.train.steps)
            _check(metrics, config.run.stop_on_mismatch)
            if stop or done == config.train.steps or done % config.run.checkpoint_every == 0:
                driver.checkpoint(done)
        if done == config.train.steps:
            driver.export(folder.path / "model")
    finally:
        for sink in sinks:
            sink.close()
    driver.actors.close()
    return done >= config.train.steps


def _check(metrics: StepMetrics, stop_on_mismatch: bool) -> None:
    if metrics.mismatched_tokens and stop_on_mismatch:
        raise RunError(
            f"step {metrics.step}: {metrics.mismatched_tokens} of {metrics.tokens} tokens have other bits in training "
            f"than in the rollout (largest difference {metrics.max_abs_diff:g}); the run stops here"
        )
    if metrics.differing_routes and stop_on_mismatch:
        raise RunError(
            f"step {metrics.step}: the trainer would route {metrics.differing_routes} tokens to other experts than the "
            "rollout did; the run stops here"
        )


class Driver:
    """Drives a rollout actor and the trainer's ranks through the steps of a run."""

    def __init__(self, prepared: Prepared, folder: RunFolder, places: Places, progress: Progress) -> None:
        self.prepared, self.config = prepared, prepared.config
        self.folder, self.progress = folder, progress
        self.actors = Actors(prepared, places, progress.waiting)
        self.version = ""

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Load the checkpoint where there is one; then give both sides the same weights and prove it."""
        actors = self.actors
        if checkpoint:
            digest, *_ = actors.every_trainer("load", "the trainer to load the checkpoint", checkpoint.policy)
            if digest != checkpoint.weights_digest:
                raise RunError(f"{checkpoint.folder} does not hold the weights it was saved with; remove it")
            self.progress.note(f"resuming after step {checkpoint.step}")
        first = self._sync(checkpoint.step if checkpoint else 0)
        self.progress.note(str(first))

    def step(self, number: int) -> StepMetrics:
        """One step: returns its metrics; the weights of both sides are equal again when it returns."""
        began = time.perf_counter()
        samples, scores, rollout_s, reward_s = self._sample(number)
        kept = [s for s in samples if not math.isnan(s.advantage)]
        if not kept:
            raise RunError(f"step {number}: every sample was dropped; the first error: {scores.errors[0]}")
        learning_rate = self._learning_rate(number)
        result, train_s = _timed(lambda: self._train(number, kept, learning_rate))
        synced, sync_s = _timed(lambda: self._sync(number))
        step_s = time.perf_counter() - began
        return StepMetrics(
            step=number,
            learning_rate=learning_rate,
            loss=result.loss,
            grad_norm=result.grad_norm,
            differing_routes=result.differing_routes,
            step_s=step_s,
            sync_bytes=synced.bytes,
            sync_copied_bytes=synced.copied_bytes,
            sync_engine_copied_bytes=synced.copied_by_engines,
            sync_gb_per_s=synced.gb_per_s,
            sync_pause_ms=synced.paused_s * 1e3,
            sync_transport=synced.transport,
            tokens_per_s=sum(len(s.generation.output_ids) for s in samples) / step_s,
            weight_version=self.version,
            rollout_s=rollout_s,
            reward_s=reward_s,
            train_s=train_s,
            sync_s=sync_s,
            correction=result.correction,
            **_reward_metrics(scores, [s.advantage for s in samples], self.config.rollout.group_size),
            **_sample_metrics(samples),
            **_comparison_metrics(kept, result, measured=self.config.correction.enabled),
        )

    def checkpoint(self, number: int) -> None:
        """Write a checkpoint that appears whole or not at all."""
        actors = self.actors
        self.folder.new_checkpoint(
            number,
            lambda path: actors.every_trainer("save", f"the checkpoint of step {number}", path)[0],
            keep=self.config.run.keep_checkpoints,
        )

    def export(self, folder: Path) -> None:
        """Write the trained model as a Hugging Face folder."""
        shutil.rmtree(folder, ignore_errors=True)
        self.actors.every_trainer("export", "the export of the trained model", folder)

    def _sample(self, number: int) -> tuple[list[Sample], rewards.Scores, float, float]:
        """The step's samples with their advantages (NaN: dropped), the scores, and seconds of rollout and reward."""
        tasks, requests = plan(self.config, self.prepared.source, self.prepared.tokenizer, number)
        generations, rollout_s = _timed(lambda: self._generate(requests, f"rollouts of step {number}"))
        stale = set().union(*(g.weight_versions for g in generations)) - {self.version}
        if stale:
            raise RunError(f"step {number}: sampled with weights {sorted(stale)}, expected version {self.version}")
        texts = [self.prepared.tokenizer.decode(g.output_ids) for g in generations]
        scores, reward_s = _timed(
            lambda: rewards.score(self.prepared.reward, tasks, texts, timeout_s=self.config.reward.timeout_s)
        )
        size = self.config.rollout.group_size
        groups = [scores.values[at : at + size] for at in range(0, len(tasks), size)]
        per_group = grpo.advantages(groups, normalize_std=self.config.algorithm.normalize_std)
        flat = [math.nan if a is None else a for group in per_group for a in group]
        samples = [Sample(*item) for item in zip(tasks, requests, generations, flat, strict=True)]
        return samples, scores, rollout_s, reward_s

    def _generate(self, requests: list[Request], what: str) -> list[Generation]:
        """The responses. An engine that dies is replaced: another one samples the same tokens."""
        for life in range(1, _LIVES + 1):
            try:
                return self.actors.generate(requests, what)
            except EngineLost as lost:
                if life == _LIVES:
                    raise
                self.progress.note(str(lost).splitlines()[0])
                self._sync(int(self.version))
        raise AssertionError("unreachable")

    def _train(self, number: int, samples: list[Sample], learning_rate: float) -> TrainReport:
        bare = [dataclasses.replace(sample, task=None) for sample in samples]  # the trainer needs no task
        correction = self.config.correction.settings()
        reports = self.actors.every_trainer(
            "step", f"training of step {number}", bare, self.config.algorithm, learning_rate, correction
        )
        return merged(reports, bare, correction)

    def _sync(self, number: int) -> SyncReport:
        """Give the engine the trainer's weights; before that, another engine if it died."""
        actors, self.version = self.actors, str(number)
        what = f"the weights of step {number} to reach the engine"
        for attempt in range(1, _LIVES + 1):
            for _ in range(actors.revive()):
                self.progress.note("an engine had died; started another one")
            try:
                return actors.wait(actors.trainer.sync.remote(self.version, self.config.weightsync.in_flight), what)
            except SyncFailed as failure:
                if attempt == _LIVES:
                    raise
                self.progress.note(f"{failure}; trying again")
        raise AssertionError("unreachable")

    def _learning_rate(self, number: int) -> float:
        warmup = self.config.train.warmup_steps
        return self.config.train.learning_rate * (min(1.0, number / warmup) if warmup else 1.0)


def _reward_metrics(scores: rewards.Scores, advantages: list[float], group_size: int) -> dict[str, Any]:
    known = [value for value in scores.values if value is not None]
    groups = [advantages[at : at + group_size] for at in range(0, len(advantages), group_size)]
    return {
        "reward_mean": statistics.fmean(known),
        "reward_std": statistics.pstdev(known),
        "samples": len(scores.values),
        "dropped": len(scores.values) - len(known),
        "informative_groups": sum(any(a and not math.isnan(a) for a in group) for group in groups),
    }


def _sample_metrics(samples: list[Sample]) -> dict[str, Any]:
    return {
        "prompt_tokens": sum(len(s.request.input_ids) for s in samples),
        "cached_tokens": sum(s.generation.cached_tokens for s in samples),
        "truncated": sum(s.generation.finish_reason == "length" for s in samples),
    }


def _comparison_metrics(samples: list[Sample], result: TrainReport, *, measured: bool) -> dict[str, Any]:
    """`measured`: say more about a difference that is there on purpose."""
    generations, scored = [s.generation for s in samples], [np.asarray(lp) for lp in result.logprobs]
    found = compare(generations, scored)
    return {
        "gap": gap(generations, scored) if measured else None,
        "tokens": found.tokens,
        "mismatched_tokens": found.mismatched_tokens,
        "nonfinite": found.nonfinite,
        "max_abs_diff": found.max_abs_diff,
        "kl_k1": found.kl.k1,
        "kl_k2": found.kl.k2,
        "kl_k3": found.kl.k3,
    }


def _timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return action(), time.perf_counter() - began
