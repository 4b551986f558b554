"""GRPO against numbers worked out by hand."""

import math

import pytest
import torch

from zerokl.orchestrate.algorithms.grpo import advantages, loss


def test_advantages_by_hand():
    # mean 0.5, population std 0.5
    assert advantages([[1.0, 0.0, 1.0, 0.0]])[0] == pytest.approx([1, -1, 1, -1], rel=1e-5)
    # mean 2, deviations -1, 0, 1
    assert advantages([[1.0, 2.0, 3.0]], normalize_std=False)[0] == pytest.approx([-1, 0, 1])
    assert advantages([[1.0, 2.0, 3.0]])[0] == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], rel=1e-5)


def test_equal_rewards_teach_exactly_nothing():
    assert advantages([[0.1] * 8, [1.0, 1.0]]) == [[0.0] * 8, [0.0, 0.0]]


def test_dropped_samples_do_not_count():
    first, dropped, last = advantages([[1.0, None, 0.0]])[0]
    assert (first, last) == pytest.approx((1, -1), rel=1e-5)
    assert dropped is None
    assert advantages([[None, None]]) == [[None, None]]
    assert advantages([[None, 0.7]]) == [[None, 0.0]]


def test_on_policy_loss_is_the_plain_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    a = torch.tensor([1.0, -1.0, 0.5])
    value = loss(logprobs, logprobs.detach().clone(), a, total_tokens=4)
    value.backward()
    assert value.item() == pytest.approx(-(1 - 1 + 0.5) / 4)
    assert logprobs.grad.tolist() == pytest.approx([-0.25, 0.25, -0.125])


def test_clip_by_hand():
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5])
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    logprobs = (old + ratios.log()).requires_grad_()
    a = torch.tensor([1.0, 1.0, -1.0, -1.0])
    value = loss(logprobs, old, a, total_tokens=4, clip_low=0.2, clip_high=0.28)
    value.backward()
    # min(1.5, 1.28), min(0.5, 0.8), min(-1.5, -1.28), min(-0.5, -0.8)
    assert value.item() == pytest.approx(-(1.28 + 0.5 - 1.5 - 0.8) / 4, rel=1e-6)
    # only the two unclipped tokens move
    assert logprobs.grad.tolist() == pytest.approx([0, -0.125, 0.375, 0])


def test_shares_of_microbatches_sum_to_the_whole():
    torch.manual_seed(0)
    logprobs, old, a = torch.randn(10), torch.randn(10), torch.randn(10)
    whole = loss(logprobs, old, a, total_tokens=10)
    parts = [loss(logprobs[s], old[s], a[s], total_tokens=10) for s in (slice(0, 3), slice(3, 10))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
