"""The claim: every sampled token's log-probability, as decoded, equals the training forward's, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3_moe", "tiny-glm4_moe", "smollm2-135m")
EQUAL = (
    "batch 1", "batch 2", "batch 7", "batch 32", "longer than a prefill chunk", "prefix-cache hit", "temperature 0.6",
    "temperature 1.7, top-p 0.8", "top-k 20, top-p 0.9", "greedy", "arrivals while others decode", "three turns",
    "after a step and a weight sync", "after the weight sync, warm prefix",
)  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def outcome(request, model_folder, tmp_path_factory):
    """What one engine and one policy answered in every scenario."""
    out = tmp_path_factory.mktemp("scenarios") / "out.json"
    script = Path(__file__).with_name("scenarios.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(model_folder(request.param)), str(out)],
        cwd=out.parent, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("scenario", EQUAL)
def test_no_bit_differs(outcome, scenario):
    found = outcome["scenarios"][scenario]
    assert found["equal"], found
    assert found["tokens"] == found["expected_tokens"]
    assert (found["mismatched_tokens"], found["max_abs_diff"], found["nonfinite"]) == (0, 0.0, 0)
    assert found["kl"] == {"k1": 0.0, "k2": 0.0, "k3": 0.0}
    assert found["differing_tokens"] == 0


def test_the_scenarios_reach_what_they_are_named_for(outcome):
    scenarios = outcome["scenarios"]
    assert scenarios["prefix-cache hit"]["cached_tokens"] >= 4 * 64
    assert scenarios["three turns"]["cached_tokens"] >= 8 * 8  # later turns hit what earlier ones computed
    # the new weights flushed what was cached under the old ones: only prefixes of the new ones may be hit
    assert scenarios["after a step and a weight sync"]["cached_tokens"] == 0
    assert scenarios["after a step and a weight sync"]["versions"] == ["1"]
    assert outcome["digests_equal_after_sync"]
    sent = outcome["sent"]  # the trainer's export is the only copy
    assert (sent["copied"], sent["by_engine"]) == (sent["bytes"], 0)


def test_an_engine_that_missed_an_update_is_found(outcome):
    stale = outcome["scenarios"]["engine one step behind"]
    assert not stale["equal"]
    assert stale["mismatched_tokens"] > stale["tokens"] // 2
    assert stale["first_mismatch"]["rollout"] != stale["first_mismatch"]["trainer"]


def test_sparse_layers_ran_on_our_ops(outcome):
    sparse = {"Qwen3MoeForCausalLM": 2, "Glm4MoeForCausalLM": 2}.get(outcome["architecture"])
    names = {"router_gate": 1, "router_topk": 1, "moe_permute": 1, "grouped_linear": 2, "moe_combine": 1}
    forwards = 2  # of the warm-up
    expected = {} if sparse is None else {name: forwards * sparse * calls for name, calls in names.items()}
    assert {name: calls for name, calls in outcome["hooks"].items() if name in names} == expected


def test_routing_replay_has_nothing_to_lower(outcome):
    """With the engines' own kernels it has: test_stock_replay.py."""
    found = [s for name, s in outcome["scenarios"].items() if name.startswith("replay ")]
    assert len(found) == (3 if "Moe" in outcome["architecture"] else 0)
    for scenario in found:
        assert scenario["equal"], scenario
        assert (scenario["mismatched_tokens"], scenario["differing_tokens"]) == (0, 0)


def test_every_fault_of_a_router_is_found(outcome):
    found = outcome["faults"]
    assert len(found) == {"Qwen3MoeForCausalLM": 4, "Glm4MoeForCausalLM": 5}.get(outcome["architecture"], 0)
    for fault, scenario in found.items():
        assert not scenario["equal"], fault
        assert scenario["mismatched_tokens"] > 0, fault
    if found:
        shifted = found["replay-shift"]
        assert shifted["differing_tokens"] > shifted["tokens"] // 2
        assert shifted["mismatched_tokens"] > shifted["tokens"] // 2
