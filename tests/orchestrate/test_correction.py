"""The trainer's step with importance weights: the decoupled loss by hand, exact runs untouched, figures recorded."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import zerokl
from zerokl.alignment.correction import Correction, Diagnostics, correct
from zerokl.alignment.mismatch import measure
from zerokl.alignment.types import Generation, Request, SamplingParams
from zerokl.orchestrate import metrics
from zerokl.orchestrate.algorithms import grpo
from zerokl.orchestrate.config import AlgorithmTable, TrainTable
from zerokl.orchestrate.samples import Sample
from zerokl.orchestrate.trainer import Trainer, merged

ROOT = Path(zerokl.__file__).resolve().parent.parent
# trainer - rollout: 0.5, -1 | 0.25, 0.5, 0
ROLLOUT = [[-1.0, -2.0], [-0.5, -3.0, -1.5]]
TRAINER = [[-0.5, -3.0], [-0.25, -2.5, -1.5]]
ADVANTAGES = [1.0, -0.5]
E_HALF, E_MINUS_1, E_QUARTER = 1.6487212707001282, 0.36787944117144233, 1.2840254166877414


class Policy:
    """Stands in for the trainer's policy: the log-probabilities are its parameters."""

    replay, replica, least_microbatches = "off", (0, 1), 1

    def __init__(self, values):
        self.parameters = [torch.tensor(value, requires_grad=True) for value in values]

    def set_learning_rate(self, rate):
        pass

    def train_step(self, microbatches, loss):
        ends = np.cumsum([0, *(len(batch.targets) for batch in microbatches)])
        scored = torch.cat(self.parameters)
        parts = [scored[a:b] for a, b in itertools.pairwise(ends)]
        losses = [loss(part, index) for index, part in enumerate(parts)]
        sum(losses).backward()
        total = sum(float(value.detach()) for value in losses)
        return SimpleNamespace(
            loss=total, grad_norm=0.0, logprobs=[part.detach() for part in parts], differing_tokens=0
        )


def step(trainer_values, correction, *, limit=64):
    """(report, gradient of the loss by every token's log-probability)"""
    trainer = Trainer()
    trainer.policy = Policy(trainer_values)
    trainer.train = TrainTable(steps=1, microbatch_tokens=limit)
    samples = []
    for values, advantage in zip(ROLLOUT, ADVANTAGES, strict=True):
        logprobs = np.array(values, np.float32)
        generation = Generation(tuple(range(len(values))), logprobs, logprobs, "stop", "0")
        samples.append(Sample(None, Request((1, 2), SamplingParams()), generation, advantage))
    report = merged([trainer.step(samples, AlgorithmTable(), 1e-3, correction)], samples, correction)
    return report, [g for p in trainer.policy.parameters for g in p.grad.tolist()]


@pytest.mark.parametrize("limit", [64, 4])  # one micro-batch, and two
def test_truncated_importance_sampling_by_hand(limit):
    report, gradient = step(TRAINER, Correction(upper=1.5), limit=limit)
    # ratio to the proximal policy is 1: terms are w * A, and so are their derivatives
    terms = [1.5 * 1.0, E_MINUS_1 * 1.0, E_QUARTER * -0.5, 1.5 * -0.5, 1.0 * -0.5]
    assert report.loss == pytest.approx(-sum(terms) / 5, abs=1e-7)  # the terms nearly cancel
    assert gradient == pytest.approx([-term / 5 for term in terms], rel=1e-6)
    assert report.correction.clipped_share == pytest.approx(2 / 5)
    assert report.correction.ess == pytest.approx(5.94934739925944**2 / (8.220620210854831 * 5), rel=1e-14)


@pytest.mark.parametrize("limit", [64, 4])
def test_masked_sequences_by_hand(limit):
    settings = Correction(level="geometric", outside="mask", upper=1.25)  # e^-0.25 | e^0.25
    report, gradient = step(TRAINER, settings, limit=limit)
    weight = 0.7788007830714049
    assert report.loss == pytest.approx(-2 * weight / 5, rel=1e-6)
    assert gradient == pytest.approx([-weight / 5] * 2 + [0] * 3, rel=1e-6)
    assert report.correction.masked_share == pytest.approx(3 / 5)
    assert (report.correction.log_ratio_min, report.correction.log_ratio_max) == (-0.25, 0.25)


def test_bypass_without_a_mask_is_the_plain_loss():
    (plain, gradient), (bypass, same) = step(TRAINER, None), step(TRAINER, Correction(old="rollout"))
    assert plain.correction is None
    assert (bypass.loss, same) == (plain.loss, gradient)
    # min(rho A, clip(rho) A) with rho = e^d: 1.2, e^-1 | -e^0.25 / 2, -e^0.5 / 2, -1 / 2
    terms = [1.2, E_MINUS_1, -E_QUARTER / 2, -E_HALF / 2, -0.5]
    assert plain.loss == pytest.approx(-sum(terms) / 5, rel=1e-6)
    masked, moved = step(TRAINER, Correction(old="rollout", outside="mask", lower=0.5, upper=1.5))
    assert masked.loss == pytest.approx(-(terms[2] + terms[4]) / 5, rel=1e-6)
    assert [g == 0 for g in moved] == [True, True, False, True, False]


@pytest.mark.parametrize("old", ["proximal", "rollout"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_an_exact_run_keeps_every_bit(old, level):
    (plain, gradient), (found, same) = step(ROLLOUT, None), step(ROLLOUT, Correction(old=old, level=level))
    assert (found.loss, same) == (plain.loss, gradient)
    assert [lp.tolist() for lp in found.logprobs] == [lp.tolist() for lp in plain.logprobs]


def test_three_policies_by_hand():
    rollout, proximal = torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -3.0])  # p / b = e^0.5, e^-1
    current = torch.tensor([-0.25, -3.5], requires_grad=True)  # c / p = e^0.25, e^-0.5
    found = correct(rollout, proximal, current, torch.tensor([0, 2]), Correction(upper=1.5))
    value = grpo.loss(current, found.old, torch.tensor([1.0, 2.0]), total_tokens=2, weights=found.weights)
    value.backward()
    # 1.5 * min(e^0.25, 1.2) and e^-1 * min(2 e^-0.5, 2 * 0.8)
    assert value.item() == pytest.approx(-(1.5 * 1.2 + E_MINUS_1 * 2 * 0.6065306597126334) / 2, rel=1e-6)
    assert current.grad.tolist() == pytest.approx([0, -E_MINUS_1 * 0.6065306597126334], rel=1e-6)


def test_a_nan_stops_the_step_before_the_update():
    with pytest.raises(FloatingPointError, match="not finite, the first at 1"):
        step([TRAINER[0], [-0.25, math.nan, -1.5]], Correction(outside="mask", upper=2.0), limit=4)


def recorded(folder, **changes):
    # every annotation is text: int, float, str
    kinds = {"int": 1, "float": 0.5, "str": "1"}
    fields = metrics.StepMetrics.__dataclass_fields__.values()
    values = {f.name: kinds[f.type] for f in fields if f.name not in ("correction", "gap")}
    file = metrics.MetricsFile(folder, keep_through=0)
    file.append(metrics.StepMetrics(**(values | changes)))
    file.close()
    return json.loads((folder / metrics.FILE).read_text())


def test_diagnostics_are_recorded_only_where_there_are_any_and_documented(tmp_path):
    plain = recorded(tmp_path)
    assert [name for name in plain if name.startswith(("correction", "gap"))] == []
    logprobs, ends = torch.tensor([-1.0, -2.0]), torch.tensor([0, 2])
    apart = measure(logprobs, torch.tensor([-1.5, -2.0]), ends, [8, 9])
    line = recorded(tmp_path, correction=Diagnostics(1.0, 0.25, 0.0, -1.0, 0.5, 0.75), gap=apart)
    gap = line.pop("gap")
    assert (gap["tokens"], gap["kl"]["k1"], gap["extremes"][0]["token"]) == (2, 0.25, 8)
    assert line == plain | {
        "correction_weight_mean": 1.0, "correction_clipped_share": 0.25, "correction_masked_share": 0.0,
        "correction_log_ratio_min": -1.0, "correction_log_ratio_max": 0.5, "correction_ess": 0.75,
    }  # fmt: skip
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in (*line, "gap") if f"`{name}`" not in text] == []
