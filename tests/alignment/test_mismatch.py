"""How far two policies are apart, against numbers worked out by hand; nothing that is not finite is hidden."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from zerokl.alignment.mismatch import gap, kl_estimates, measure
from zerokl.alignment.ratios import at_level, effective_sample_size, log_ratios, sequence_lengths
from zerokl.alignment.types import Generation

# trainer - rollout is 0.5, -1 in the first response and 0.25, 0.5, 0 in the second
ROLLOUT = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5])
TRAINER = torch.tensor([-0.5, -3.0, -0.25, -2.5, -1.5])
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
TOKENS = [70, 71, 80, 81, 82]
# e^0.5, e^-1, e^0.25, e^0.5, e^0
RATIOS = [1.6487212707001282, 0.36787944117144233, 1.2840254166877414, 1.6487212707001282, 1.0]


def exactly(value):
    return pytest.approx(value, rel=1e-14, abs=0)


def test_estimators_of_kl_by_hand():
    kl = kl_estimates(ROLLOUT.numpy(), TRAINER.numpy())
    assert kl.k1 == exactly(-(0.5 - 1 + 0.25 + 0.5) / 5)
    assert kl.k2 == exactly((0.25 + 1 + 0.0625 + 0.25) / 2 / 5)
    assert kl.k3 == exactly((5.94934739925944 - 5 - 0.25) / 5)  # sum of RATIOS, less 1 and d each


def test_k3_of_one_token_is_never_negative():
    for d in (-2.0, -0.5, 0.5, 2.0):
        assert kl_estimates(np.zeros(1, np.float32), np.array([d], np.float32)).k3 == exactly(math.exp(d) - 1 - d)


def test_ratios_of_tokens_sequences_and_their_geometric_mean():
    d, lengths = log_ratios(ROLLOUT, TRAINER), sequence_lengths(CU, 5)
    assert lengths.tolist() == [2, 3]
    assert at_level(d, lengths, "token").exp().tolist() == exactly(RATIOS)
    assert at_level(d, lengths, "sequence").exp().tolist() == exactly(
        [0.6065306597126334, 2.117000016612675]
    )  # -.5 .75
    assert at_level(d, lengths, "geometric").exp().tolist() == exactly([0.7788007830714049, 1.2840254166877414])
    with pytest.raises(ValueError, match="level must be one of token, sequence, geometric"):
        at_level(d, lengths, "batch")


def test_differences_are_not_rounded_to_fp32():
    d = log_ratios(torch.tensor([-16.0]), torch.tensor([-0.1]))  # fp32's -0.1 is -0.10000000149011612
    assert d.tolist() == [15.899999998509884]


def test_effective_sample_size_by_hand():
    assert effective_sample_size(torch.tensor([1.0, 3.0], dtype=torch.float64).log()) == exactly(16 / 10 / 2)
    assert effective_sample_size(torch.full((7,), 0.3, dtype=torch.float64)) == 1.0
    # one sample outweighs the other by e^2000: neither infinite nor NaN
    assert effective_sample_size(torch.tensor([1000.0, -1000.0], dtype=torch.float64)) == exactly(0.5)


def test_measure_by_hand():
    gap = measure(ROLLOUT, TRAINER, CU, TOKENS, extremes=3)
    assert (gap.tokens, gap.sequences, gap.nonfinite) == (5, 2, 0)
    assert gap.kl == kl_estimates(ROLLOUT.numpy(), TRAINER.numpy())
    assert (gap.ratio_mean, gap.ratio_min, gap.ratio_max) == exactly((5.94934739925944 / 5, RATIOS[1], RATIOS[0]))
    assert (gap.sequence_log_ratio_min, gap.sequence_log_ratio_max) == (-0.5, 0.75)
    # mean log-probabilities -1.6 and -1.55
    assert (gap.perplexity_rollout, gap.perplexity_trainer) == exactly((4.953032424395115, 4.711470182590742))
    assert gap.perplexity_gap == pytest.approx(-0.241562241804373, rel=1e-13)
    # squares: e^1, e^-2, e^0.5, e^1, 1
    squares = 2.718281828459045 + 0.1353352832366127 + 1.6487212707001282 + 2.718281828459045 + 1
    assert gap.ess_tokens == exactly(5.94934739925944**2 / squares / 5)
    assert gap.ess_sequences == exactly((0.6065306597126334 + 2.117000016612675) ** 2
                                        / (0.36787944117144233 + 4.4816890703380645) / 2)  # fmt: skip


def test_extreme_tokens_are_named_largest_first_and_ties_in_order():
    rows = [tuple(row.values()) for row in measure(ROLLOUT, TRAINER, CU, TOKENS, extremes=4).to_dict()["extremes"]]
    assert rows == [(0, 1, 71, -2.0, -3.0), (0, 0, 70, -1.0, -0.5), (1, 1, 81, -3.0, -2.5), (1, 0, 80, -0.5, -0.25)]
    assert len(measure(ROLLOUT, TRAINER, CU, torch.tensor(TOKENS)).extremes) == 5  # never more than there are
    assert measure(ROLLOUT, TRAINER, CU, TOKENS, extremes=0).extremes == ()


def test_equal_policies_are_exactly_at_zero():
    gap = measure(ROLLOUT, ROLLOUT.clone(), CU, TOKENS)
    assert (gap.kl.k1, gap.kl.k2, gap.kl.k3, gap.perplexity_gap) == (0.0, 0.0, 0.0, 0.0)
    assert (gap.ratio_mean, gap.ratio_min, gap.ratio_max) == (1.0, 1.0, 1.0)
    assert (gap.sequence_log_ratio_min, gap.sequence_log_ratio_max) == (0.0, 0.0)
    assert (gap.ess_tokens, gap.ess_sequences) == (1.0, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_is_counted_named_and_spoils_every_figure(value, both):
    rollout, trainer = ROLLOUT.clone(), TRAINER.clone()
    trainer[4] = value
    if both:
        rollout[4] = value
    gap = measure(rollout, trainer, CU, TOKENS)
    assert gap.nonfinite == 1
    assert (gap.extremes[0].sample, gap.extremes[0].position, gap.extremes[0].token) == (1, 2, 82)
    plain = gap.to_dict()
    json.dumps(plain, allow_nan=False)
    assert plain["extremes"][0]["trainer"] is None
    counts = {"tokens", "sequences", "nonfinite", "extremes", "kl"}
    assert [name for name, figure in plain.items() if name not in counts and figure is not None] == []
    assert plain["kl"] == {"k1": None, "k2": None, "k3": None}
    with pytest.raises(FloatingPointError, match=r"1 of 5 tokens .* the first at 4"):
        log_ratios(rollout, trainer)


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="equal 1-D"):
        measure(ROLLOUT, TRAINER[:4], CU, TOKENS)
    with pytest.raises(ValueError, match="not empty"):
        log_ratios(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match="float32"):
        measure(ROLLOUT.double(), TRAINER, CU, TOKENS)
    with pytest.raises(ValueError, match="5 token ids"):
        measure(ROLLOUT, TRAINER, CU, TOKENS[1:])
    for cu, message in (
        ([0, 2, 4], "0 to the 5 tokens, got 0 to 4"),
        ([1, 2, 5], "got 1 to 5"),
        ([0, 2, 2, 5], "sequence 1 has no token"),
        ([0, 4, 2, 5], "sequence 1"),
        ([0.0, 5.0], "int32 or int64"),
        ([0], "B at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(ROLLOUT, TRAINER, torch.tensor(cu), TOKENS)


def test_the_gap_of_generations_is_measured_on_their_tokens():
    parts = [slice(0, 2), slice(2, 2), slice(2, 5)]  # the one in the middle sampled nothing
    generations = [
        Generation(tuple(TOKENS[part]), ROLLOUT[part].numpy(), ROLLOUT[part].numpy(), "stop", "1") for part in parts
    ]
    scored = [TRAINER[part].numpy() for part in parts]
    found, whole = gap(generations, scored), measure(ROLLOUT, TRAINER, CU, TOKENS)
    assert dataclasses.replace(found, extremes=()) == dataclasses.replace(whole, extremes=())
    assert [(t.sample, t.position, t.token) for t in found.extremes] == [
        (0, 1, 71), (0, 0, 70), (2, 1, 81), (2, 0, 80), (2, 2, 82)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"each of the tokens \[2, 0, 3\], got \[2, 0, 2\]"):
        gap(generations, [*scored[:2], scored[2][:2]])
    with pytest.raises(ValueError, match="at least one sampled token"):
        gap(generations[1:2], scored[1:2])
