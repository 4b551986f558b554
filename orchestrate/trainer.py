"""The trainer actor: owns one rank's `MegatronPolicy` in a Ray worker process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zerokl.orchestrate import hosts
from zerokl.orchestrate.errors import RunError, SyncFailed, UserError
from zerokl.orchestrate.hosts import Host
from zerokl.orchestrate.logs import redirect_output
from zerokl.orchestrate.samples import Sample, dealt, microbatches

if TYPE_CHECKING:
    import torch

    from zerokl.alignment.architectures import Architecture
    from zerokl.alignment.correction import Corrected, Correction, Diagnostics
    from zerokl.alignment.megatron.layout import Layout
    from zerokl.alignment.megatron.policy import MegatronPolicy
    from zerokl.orchestrate.config import AlgorithmTable, TrainTable
    from zerokl.orchestrate.weights import Meeting, SyncReport, WeightLink
    from zerokl.weightsync.messages import InFlight

_JOIN_S = 20.0  # for a running engine; its receiving end connects when its scheduler starts


@dataclass(frozen=True)
class Member:
    """One of the trainer's ``ranks``, the file where they find each other (None for a single one), and the network
    device by which this one reaches the others."""

    rank: int = 0
    ranks: int = 1
    rendezvous: Path | None = None
    interface: str = "lo"


@dataclass(frozen=True)
class RankReport:
    """One optimizer step as one rank saw it: its data-parallel ``replica``, the summed loss of that one's samples, the
    gradient norm before clipping, the log-probabilities (fp32 [n]) by sample, and how many of their tokens the trainer
    would have sent to other experts."""

    replica: int
    loss: float
    grad_norm: float
    logprobs: Mapping[int, np.ndarray]
    differing_routes: int = 0


@dataclass(frozen=True)
class TrainReport:
    """One optimizer step: loss, gradient norm before clipping, the log-probabilities (fp32 [n]) of every sample, and
    what the importance weights of the step did (None without correction). ``differing_routes``: tokens whose experts
    the trainer would choose otherwise (with routing replay `check`)."""

    loss: float
    grad_norm: float
    logprobs: list[np.ndarray]
    correction: Diagnostics | None = None
    differing_routes: int = 0


def merged(
    reports: Sequence[RankReport], samples: Sequence[Sample], correction: Correction | None = None
) -> TrainReport:  # fmt: skip
    """The step as a whole. Raises RunError where ranks that computed the same do not have the same bits."""
    replicas = {report.replica: report for report in reversed(reports)}
    if len({report.grad_norm for report in reports}) > 1:
        raise RunError(f"trainer ranks have different gradient norms: {[report.grad_norm for report in reports]}")
    logprobs: dict[int, np.ndarray] = {}
    for rank, report in enumerate(reports):
        for index, values in report.logprobs.items():
            if logprobs.setdefault(index, values).tobytes() != values.tobytes():
                raise RunError(f"trainer rank {rank} scores sample {index} otherwise than a rank before it")
    scored = [logprobs[index] for index in range(len(samples))]
    diagnostics = None
    if correction is not None:
        import torch

        diagnostics = _corrected(samples, torch.from_numpy(_concatenated(scored)), correction).diagnostics
    return TrainReport(
        sum(replicas[replica].loss for replica in sorted(replicas)),
        reports[0].grad_norm,
        scored,
        diagnostics,
        sum(report.differing_routes for report in replicas.values()),
    )


class Trainer:
    """Plain Python, so that it can be tested without Ray; the driver wraps it as an actor."""

    policy: MegatronPolicy
    train: TrainTable
    link: WeightLink

    def host(self, needed: Sequence[Path]) -> Host:
        """Where this actor is; see `hosts.here`."""
        return hosts.here(needed)

    def start(
        self,
        model: Path,
        train: TrainTable,
        log: Path,
        *,
        layout: Layout,
        member: Member,
        architecture: Architecture | None = None,
        stock: bool = False,
        meeting: Meeting | None = None,
        engine_ranks: int = 1,
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Load the model; returns (manifest, weights digest). Not the constructor: there, errors lose their type.

        `stock`: Megatron's own layers and no optimizer, for the control. `meeting`: where the engine waits for weights.
        `engine_ranks`: the digest is of the parts that its ranks hold.
        """
        redirect_output(log)
        from zerokl.alignment.megatron import distributed
        from zerokl.alignment.megatron.policy import MegatronPolicy

        if member.rendezvous is not None:
            distributed.connect(member.rank, member.ranks, member.rendezvous, member.interface)
        self.policy = MegatronPolicy(
            model,
            architecture=architecture,
            optimizer=None if stock else _optimizer(train),
            stock=stock,
            recompute=train.recompute,
            replay="off" if stock else train.routing_replay,
            threads=train.threads,
            layout=layout,
        )
        self.train = train
        if meeting is not None:
            self._join(meeting, member.rank)
        return self.policy.manifest(), self.policy.weights_digest(engine_ranks)

    def _join(self, meeting: Meeting, rank: int) -> None:
        """Send this rank's weights when there are transfers; the first rank coordinates them."""
        from zerokl.orchestrate.weights import WeightLink, sending_rank
        from zerokl.weightsync.live_model import block_layout

        layout, buffers = block_layout(*self.policy.weight_blocks())
        if rank == 0:
            self.link = WeightLink(meeting, layout, buffers)
            self._sending = self.link.source
        else:
            self._sending = sending_rank(meeting, layout, buffers, rank)
        self.policy.new_memory = self._sending.renew  # what the engine reads is not written any more

    def step(
        self,
        samples: Sequence[Sample],
        algorithm: AlgorithmTable,
        learning_rate: float,
        correction: Correction | None = None,
    ) -> RankReport:
        """One optimizer step on the samples, of which this rank's replica computes its share; their log-probabilities
        are those of this very forward.

        `correction` weights the loss for samples of another policy; None trusts the rollout's log-probabilities.
        """
        import torch

        from zerokl.alignment.types import PackedBatch
        from zerokl.orchestrate.algorithms import grpo
        from zerokl.orchestrate.scoring import check_routing

        check_routing(self.policy, samples)
        replica, replicas = self.policy.replica
        least = self.policy.least_microbatches
        batches = dealt(microbatches(samples, self.train.microbatch_tokens), replicas, least)[replica]
        packed = [PackedBatch.pack(*_pairs([samples[i] for i in batch]), order=batch[0]) for batch in batches]
        old = [_concatenated([samples[i].generation.logprobs for i in batch]) for batch in batches]
        advantage = [_concatenated([_spread(samples[i]) for i in batch]) for batch in batches]
        total = sum(len(sample.generation.output_ids) for sample in samples)

        def loss(logprobs: torch.Tensor, index: int) -> torch.Tensor:
            anchor, weights = torch.from_numpy(old[index]), None
            if correction is not None:
                corrected = _corrected([samples[i] for i in batches[index]], logprobs.detach(), correction)
                anchor, weights = corrected.old, corrected.weights
            return grpo.loss(
                logprobs,
                anchor,
                torch.from_numpy(advantage[index]),
                total_tokens=total,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                weights=weights,
            )

        self.policy.set_learning_rate(learning_rate)
        result = self.policy.train_step(packed, loss)
        scored: dict[int, np.ndarray] = {}
        for batch, lp in zip(batches, result.logprobs, strict=True):
            scored |= zip(batch, _split(samples, batch, lp), strict=True)
        return RankReport(replica, result.loss, result.grad_norm, scored, result.differing_tokens)

    def score(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Log-probabilities of every sample by the training forward (gradients on), without an update."""
        from zerokl.orchestrate.scoring import score

        return score(self.policy, *_pairs(samples))

    def sync(self, version: str, in_flight: InFlight) -> SyncReport:
        """Put the current weights into the engine; `in_flight`: what becomes of requests under way.

        Raises SyncFailed, with the cause, if they did not get there; UserError if this transport never could."""
        from zerokl.weightsync.errors import WeightSyncError
        from zerokl.weightsync.topology import Unfit

        try:
            return self.link.sync(version, timeout_s=_JOIN_S, in_flight=in_flight)
        except Unfit as unfit:
            raise UserError(unfit.cause, unfit.remedy) from unfit
        except (WeightSyncError, TimeoutError) as error:
            raise SyncFailed(str(error)) from error

    def save(self, folder: Path) -> dict[str, str]:
        """Write a policy checkpoint; returns the digest of the weights in it."""
        self.policy.save(folder)
        return self.policy.weights_digest()

    def load(self, folder: Path) -> dict[str, str]:
        """Continue from a policy checkpoint; returns the digest of the weights now held."""
        self.policy.load(folder)
        return self.policy.weights_digest()

    def export(self, folder: Path) -> None:
        """Write the current weights as a Hugging Face folder."""
        self.policy.export_hf(folder)


def _optimizer(train: TrainTable) -> Any:
    from zerokl.alignment.megatron.optimizer import OptimizerSettings

    return OptimizerSettings(
        learning_rate=train.learning_rate,
        beta1=train.betas[0],
        beta2=train.betas[1],
        eps=train.eps,
        weight_decay=train.weight_decay,
        clip_grad=train.max_grad_norm,
    )


def _pairs(samples: Sequence[Sample]) -> tuple[list[Any], list[Any]]:
    return [s.request for s in samples], [s.generation for s in samples]


def _corrected(samples: Sequence[Sample], logprobs: torch.Tensor, settings: Correction) -> Corrected:
    """Weights for the samples' tokens, packed in order; `logprobs` fp32 [n]: the trainer's, before the update.

    One update for each batch of samples: the policy it starts from is both the proximal and the current one.
    """
    import torch

    from zerokl.alignment.correction import correct

    rollout = torch.from_numpy(_concatenated([s.generation.logprobs for s in samples]))
    ends = np.cumsum([0, *(len(s.generation.output_ids) for s in samples)])
    return correct(rollout, logprobs, logprobs, torch.from_numpy(ends), settings)


def _spread(sample: Sample) -> np.ndarray:
    """The sample's advantage on every one of its tokens."""
    return np.full(len(sample.generation.output_ids), sample.advantage, np.float32)


def _concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float32, copy=False)


def _split(samples: Sequence[Sample], batch: Sequence[int], logprobs: torch.Tensor) -> list[np.ndarray]:
    """Packed fp32 [n] log-probabilities back to one array per sample."""
    counts = [len(samples[i].generation.output_ids) for i in batch]
    return np.split(logprobs.numpy(), np.cumsum(counts)[:-1])
