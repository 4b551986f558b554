"""What routing replay is for: with the engines' own kernels it lowers their mismatch (with ours there is none)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def outcome(model_folder, tmp_path_factory):
    """One stock rollout, scored by stock Megatron-Core with replay off, on and in check mode."""
    out = tmp_path_factory.mktemp("stock") / "out.json"
    script = Path(__file__).with_name("stock_replay.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(model_folder("tiny-qwen3_moe")), str(out)],
        cwd=out.parent, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


def test_replay_lowers_the_mismatch_of_stock_kernels(outcome):
    """The same 768 tokens both times; measured k3 falls to a ninth, the mean difference to three fifths."""
    off, on = outcome["off"], outcome["on"]
    assert off["tokens"] == on["tokens"] == 32 * 24
    assert on["kl"]["k3"] < off["kl"]["k3"] / 2
    assert on["mean_abs_diff"] < 0.9 * off["mean_abs_diff"]
    assert on["max_abs_diff"] < off["max_abs_diff"]
    assert on["mismatched_tokens"] > on["tokens"] // 2, "replay alone makes nothing exact"


def test_some_tokens_went_to_other_experts(outcome):
    """Which is what replay undoes: check mode counts them and scores like on."""
    check = outcome["check"]
    assert 0 < check["differing_tokens"] < outcome["fed_tokens"] // 2
    assert {k: v for k, v in check.items() if k != "differing_tokens"} == {
        k: v for k, v in outcome["on"].items() if k != "differing_tokens"
    }
