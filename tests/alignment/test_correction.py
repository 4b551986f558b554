"""Importance weights against numbers worked out by hand, and bounds that are refused where they mean nothing."""

import math

import pytest
import torch

from zerokl.alignment.correction import Correction, correct

# proximal - rollout: 0.5, -1 | 0.25, 0.5, 0      current - rollout: 0, 1 | -0.5, 0.25, -0.5
ROLLOUT = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5])
PROXIMAL = torch.tensor([-0.5, -3.0, -0.25, -2.5, -1.5])
CURRENT = torch.tensor([-1.0, -1.0, -1.0, -2.75, -2.0])
CU = torch.tensor([0, 2, 5], dtype=torch.int32)
E_HALF, E_MINUS_1, E_QUARTER = 1.6487212707001282, 0.36787944117144233, 1.2840254166877414
SEQUENCE = [0.6065306597126334, 2.117000016612675]  # e^(0.5 - 1), e^(0.25 + 0.5 + 0)
GEOMETRIC = [0.7788007830714049, 1.2840254166877414]  # e^(-0.5 / 2), e^(0.75 / 3)

CASES = [
    # Hilton et al., AReaL: p / b as it is
    (Correction(), [E_HALF, E_MINUS_1, E_QUARTER, E_HALF, 1.0], 0, 0),
    # Yao et al.: min(p / b, C)
    (Correction(upper=1.5), [1.5, E_MINUS_1, E_QUARTER, 1.5, 1.0], 2 / 5, 0),
    (Correction(lower=0.5, upper=1.5), [1.5, 0.5, E_QUARTER, 1.5, 1.0], 3 / 5, 0),
    # IcePop: p / b inside [alpha, beta], else 0
    (Correction(outside="mask", lower=0.5, upper=1.5), [0, 0, E_QUARTER, 0, 1.0], 0, 3 / 5),
    (Correction(outside="mask", lower=0.5), [E_HALF, 0, E_QUARTER, E_HALF, 1.0], 0, 1 / 5),
    # a bound holds its end points: the last token's ratio is exactly 1
    (Correction(outside="mask", upper=1.0), [0, E_MINUS_1, 0, 0, 1.0], 0, 3 / 5),
    (Correction(outside="mask", lower=1.0), [E_HALF, 0, E_QUARTER, E_HALF, 1.0], 0, 1 / 5),
    # products; bounding the tokens first would leave 2.117 as it is, for none of them exceeds 2
    (Correction(level="sequence", upper=2.0), [SEQUENCE[0]] * 2 + [2.0] * 3, 3 / 5, 0),
    (Correction(level="sequence", outside="mask", upper=2.0), [SEQUENCE[0]] * 2 + [0] * 3, 0, 3 / 5),
    # geometric means; bounding the tokens first would touch three of them, but both means are inside
    (Correction(level="geometric", lower=0.75, upper=1.3), [GEOMETRIC[0]] * 2 + [GEOMETRIC[1]] * 3, 0, 0),
    (Correction(level="geometric", upper=1.25), [GEOMETRIC[0]] * 2 + [1.25] * 3, 3 / 5, 0),
    (Correction(level="geometric", outside="mask", lower=0.8), [0] * 2 + [GEOMETRIC[1]] * 3, 0, 2 / 5),
    # the bypass: c / b is in the loss already, so the weight is 1 or 0
    (Correction(old="rollout"), [1.0] * 5, 0, 0),
    (Correction(old="rollout", outside="mask", lower=0.7, upper=2.0), [1, 0, 0, 1, 0], 0, 3 / 5),  # 1 e | .6 1.3 .6
    (Correction(old="rollout", level="sequence", outside="mask", upper=2.0), [0, 0, 1, 1, 1], 0, 2 / 5),  # e | e^-.75
    (Correction(old="rollout", level="geometric", outside="mask", lower=0.8), [1, 1, 0, 0, 0], 0, 3 / 5),  # e^-.25
]


@pytest.mark.parametrize(("settings", "weights", "clipped", "masked"), CASES)
def test_weights_by_hand(settings, weights, clipped, masked):
    found = correct(ROLLOUT, PROXIMAL, CURRENT, CU, settings)
    assert found.weights.dtype == torch.float32
    assert found.weights.tolist() == pytest.approx(weights, rel=6e-8, abs=0)  # one rounding to fp32
    assert found.diagnostics.clipped_share == pytest.approx(clipped, rel=1e-15)
    assert found.diagnostics.masked_share == pytest.approx(masked, rel=1e-15)
    assert found.diagnostics.weight_mean == pytest.approx(sum(weights) / 5, rel=1e-14)
    assert torch.equal(found.old, ROLLOUT if settings.old == "rollout" else PROXIMAL)


def test_diagnostics_are_of_the_ratio_before_its_bounds():
    token = correct(ROLLOUT, PROXIMAL, CURRENT, CU, Correction(lower=0.9, upper=1.1)).diagnostics
    assert (token.log_ratio_min, token.log_ratio_max) == (-1.0, 0.5)
    # sum of the five ratios, and of their squares e^1, e^-2, e^0.5, e^1, 1
    assert token.ess == pytest.approx(5.94934739925944**2 / (8.220620210854831 * 5), rel=1e-14)
    sequence = correct(ROLLOUT, PROXIMAL, CURRENT, CU, Correction(level="sequence")).diagnostics
    assert (sequence.log_ratio_min, sequence.log_ratio_max) == (-0.5, 0.75)
    assert sequence.ess == pytest.approx(sum(SEQUENCE) ** 2 / (0.36787944117144233 + 4.4816890703380645) / 2, rel=1e-14)
    bypass = correct(ROLLOUT, PROXIMAL, CURRENT, CU, Correction(old="rollout", level="sequence")).diagnostics
    assert (bypass.log_ratio_min, bypass.log_ratio_max) == (-0.75, 1.0)
    assert list(token.to_dict()) == [
        "weight_mean", "clipped_share", "masked_share", "log_ratio_min", "log_ratio_max", "ess"
    ]  # fmt: skip


@pytest.mark.parametrize("old", ["proximal", "rollout"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_equal_bits_weigh_exactly_one(old, level):
    settings = Correction(old=old, level=level, outside="mask", lower=1.0, upper=1.0)
    found = correct(ROLLOUT, ROLLOUT.clone(), ROLLOUT.clone(), CU, settings)
    assert found.weights.tolist() == [1.0] * 5
    assert found.diagnostics.masked_share == 0
    assert found.diagnostics.ess == 1.0


def test_weights_and_anchor_are_constants():
    live = PROXIMAL.clone().requires_grad_()
    for old in ("proximal", "rollout"):
        found = correct(ROLLOUT.clone().requires_grad_(), live, live, CU, Correction(old=old))
        assert not found.weights.requires_grad
        assert not found.old.requires_grad


def test_a_response_is_weighted_alike_in_any_batch():
    settings = Correction(level="sequence", upper=2.0)
    alone = correct(ROLLOUT[2:], PROXIMAL[2:], CURRENT[2:], torch.tensor([0, 3]), settings)
    assert torch.equal(alone.weights, correct(ROLLOUT, PROXIMAL, CURRENT, CU, settings).weights[2:])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "settings",
    [Correction(upper=2.0), Correction(outside="mask", upper=2.0),
     Correction(old="rollout", outside="mask", upper=2.0)],
)  # fmt: skip
def test_what_is_not_finite_is_an_error(which, value, settings):
    policies = [ROLLOUT.clone(), PROXIMAL.clone(), CURRENT.clone()]
    policies[which][3] = value
    with pytest.raises(FloatingPointError, match="tokens have a log-probability that is not finite, the first at 3"):
        correct(*policies, CU, settings)


def test_ratios_beyond_every_float():
    rollout, proximal = torch.tensor([-500.0, -500.0, -1.0]), torch.tensor([-1.0, -1.0, -500.0])
    cu = torch.tensor([0, 2, 3])

    def weights(**settings):
        return correct(rollout, proximal, proximal, cu, Correction(level="sequence", **settings))

    assert weights(upper=2.0).weights.tolist() == [2.0, 2.0, pytest.approx(math.exp(-499), abs=1e-45)]
    assert weights(upper=2.0).diagnostics.ess == pytest.approx(0.5)
    assert weights(outside="mask", upper=2.0).weights.tolist()[:2] == [0.0, 0.0]
    with pytest.raises(FloatingPointError, match="importance weight of inf exceeds float32: set an upper bound"):
        weights()
    with pytest.raises(FloatingPointError, match="exceeds float32"):  # e^100: finite in double precision alone
        correct(torch.tensor([-101.0]), torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([0, 1]), Correction())


def test_shapes_and_boundaries_are_checked():
    with pytest.raises(ValueError, match="equal 1-D"):
        correct(ROLLOUT, PROXIMAL, CURRENT[:4], CU, Correction())
    with pytest.raises(ValueError, match="float32"):
        correct(ROLLOUT, PROXIMAL.double(), CURRENT, CU, Correction())
    with pytest.raises(ValueError, match="0 to the 5 tokens"):
        correct(ROLLOUT, PROXIMAL, CURRENT, CU - 1, Correction())
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        correct(ROLLOUT, PROXIMAL, CURRENT, torch.tensor([0, 5, 5]), Correction())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lower": -0.1}, "lower must lie"),
        ({"lower": 1.1}, "lower must lie"),
        ({"lower": math.nan}, "lower must lie"),
        ({"upper": 0.9}, "upper must be"),
        ({"upper": math.inf}, "upper must be"),
        ({"upper": math.nan}, "upper must be"),
        ({"outside": "mask"}, "needs lower or upper"),
        ({"old": "rollout", "upper": 2.0}, "bounds nothing"),
        ({"old": "rollout", "lower": 0.5}, "bounds nothing"),
        ({"old": "reference"}, "old must be one of proximal, rollout"),
        ({"level": "batch"}, "level must be one of token, sequence, geometric"),
        ({"outside": "drop"}, "outside must be one of truncate, mask"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Correction(**values)


def test_every_problem_is_named_at_once():
    with pytest.raises(ValueError, match=r"level must .*; lower must .*; upper must .*"):
        Correction(level="batch", lower=2.0, upper=0.5)
