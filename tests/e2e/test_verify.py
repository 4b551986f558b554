"""The command `zerokl verify` as a user runs it: its exit codes and its JSON."""

import json
import shlex

import pytest

FEW = ("--max-new-tokens", "12")


@pytest.fixture
def verify(zerokl, model_folder, tmp_path):
    """verify(model name, options...) -> (exit code, the JSON it wrote, what it printed)"""

    def run(name, *options):
        out = tmp_path / "out.json"
        done = zerokl("verify", "--model", model_folder(name), "--json", out, *options)
        assert out.is_file(), done.stdout + done.stderr
        return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr

    return run


def test_a_real_model_agrees_on_two_thousand_tokens(verify):
    code, found, printed = verify("smollm2-135m")
    assert code == 0, printed
    assert found["tokens"] >= 2000
    assert (found["mismatched_tokens"], found["max_abs_diff"], found["nonfinite"]) == (0, 0.0, 0)
    assert found["kl"] == {"k1": 0.0, "k2": 0.0, "k3": 0.0}
    assert found["first_mismatch"] is None
    assert found["weights_digest"]["engine"] == found["weights_digest"]["trainer"]
    assert found["longest_prompt"] > 256, "no prompt was longer than a prefill chunk"
    assert found["cached_tokens"] > 0, "no prompt hit the prefix cache"
    assert {"contract", "profile", "ops"} <= found["manifest"].keys()
    assert {"sglang", "megatron-core", "torch", "zerokl"} <= found["versions"].keys()
    assert "EQUAL, bit for bit" in printed
    assert found["trace"] is None


def test_sampling_options_and_own_prompts(verify, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "two words"}, {"prompt": [{"role": "user", "content": "hi"}]}, {"input_ids": [5, 6, 7]}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sampling = ("--temperature", "0.7", "--top-p", "0.9", "--max-new-tokens", "80")
    code, found, printed = verify("tiny-qwen3_moe", "--prompts", prompts, "--replay", "check", *sampling)
    assert code == 0, printed
    assert found["requests"] == 3
    assert found["tokens"] > 0
    assert found["routing"] == {"replay": "check", "differing_tokens": 0}
    assert "routed otherwise  0 tokens" in printed
    assert found["manifest"]["ops"]["router_topk"]["rollout_calls"] > 0
    assert found["manifest"]["ops"]["router_topk"]["trainer_calls"] > 0


@pytest.mark.parametrize("fault", ["ulp", "nan", "weight-bit"])
def test_every_planted_fault_is_found(verify, fault):
    code, found, printed = verify("tiny-llama", "--inject", fault, *FEW)
    assert code == 1, printed
    assert "NOT EQUAL" in printed
    assert found["trace"] in printed
    options = dict(zip(*[iter(shlex.split(found["trace"])[2:])] * 2, strict=True))
    assert options["--model"].endswith("tiny-llama")
    wrong = found["first_mismatch"]
    assert options["--request"] == str(wrong["request"] if wrong else 0)
    assert (found["nonfinite"] > 0) == (fault == "nan")
    assert (found["weights_digest"]["engine"] != found["weights_digest"]["trainer"]) == (fault == "weight-bit")
    if fault == "ulp":
        assert found["mismatched_tokens"] == 1
        assert 0 < found["max_abs_diff"] < 1e-5


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3_moe"])
def test_the_engines_own_kernels_differ(verify, name):
    code, found, printed = verify(name, "--control", "stock", *FEW)
    assert code == 1, printed
    assert found["mismatched_tokens"] > found["tokens"] // 2
    assert found["kl"]["k3"] > 0
    furthest = found["gap"]["extremes"][0]
    assert abs(furthest["rollout"] - furthest["trainer"]) == pytest.approx(found["max_abs_diff"], rel=1e-6)
    assert f"far apart         request {furthest['sample']}, generated token {furthest['position']}" in printed
    assert found["weights_digest"]["engine"] == found["weights_digest"]["trainer"]


def test_transfers_under_drawn_faults_leave_every_rank_of_an_engine_equal(verify):
    """More rounds: zerokl verify --syncs 20 --faults random."""
    ranks = ("--segments", "2", "--rollout-tensor-parallel", "2")
    code, found, printed = verify("tiny-llama", "--syncs", "4", "--faults", "random", "--seed", "2", *ranks, *FEW)
    assert code == 0, printed
    assert found["mismatched_tokens"] == 0
    assert len({row["fault"] for row in found["syncs"]}) == 4
    for row in found["syncs"]:
        assert row["ok"], row
        assert row["witness"], row
    assert "weight transfers  4 rounds, all well" in printed
    assert "MB by ipc (host memory of one host) at " in printed
