"""`zerokl trace` names the op, layer, token and element of one planted ULP, whichever op and side it is planted in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DENSE = {"embedding", "rms_norm", "linear", "rotary", "attention", "silu_and_mul", "logprob"}
SPARSE = (DENSE - {"silu_and_mul"}) | {
    "router_topk", "moe_gather", "grouped_linear", "expert_silu_and_mul", "moe_combine"
}  # fmt: skip
OPS = {"tiny-llama": DENSE, "tiny-qwen3_moe": SPARSE}


@pytest.fixture(scope="module", params=OPS)
def outcome(request, model_folder, tmp_path_factory):
    """The model's name, and what the traces of one engine and one policy found."""
    folder = tmp_path_factory.mktemp("traces")
    script = Path(__file__).with_name("trace_scenarios.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(model_folder(request.param)), str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return request.param, json.loads((folder / "out.json").read_text())


def test_equal_engines_differ_in_no_op(outcome):
    name, found = outcome
    assert found["clean"] == [True, True]
    assert found["passes"] == 3 + 2  # prefill chunks, and decode steps: the last token is never fed back
    assert set(found["ops"]) == OPS[name]


@pytest.mark.parametrize("side", ["rollout", "trainer"])
def test_one_ulp_in_any_op_is_named(outcome, side):
    name, everything = outcome
    results = [result for result in everything["found"] if result["side"] == side]
    assert {result["plant"]["op"] for result in results} == OPS[name]
    for result in results:
        plant, found = result["plant"], result["found"]
        assert found is not None, plant
        named = {key: found["step"][key] for key in ("op", "layer", "call")}
        assert named == {key: plant[key] for key in named}, (plant, found)
        assert (found["token"], found["element"]) == (plant["token"], plant["element"]), (plant, found)
        other = "trainer" if side == "rollout" else "rollout"
        assert int(found[side]["bits"], 16) == int(found[other]["bits"], 16) + 1, (plant, found)


def test_the_command_names_a_planted_fault(zerokl, model_folder, tmp_path):
    done = zerokl(
        "trace", "--model", model_folder("tiny-llama"), "--input-ids", "5,6,7,8,9", "--max-new-tokens", 3,
        "--inject-op", "linear:1", "--inject-layer", 1, "--inject-token", 6, "--inject-element", 9,
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "first difference  layer 1, linear:1, y: token 6, element 9 of 256" in done.stdout
    assert "model.layers.1.self_attn.o_proj" in done.stdout
    assert "decoder.layers.1.self_attention.linear_proj" in done.stdout
    assert done.stdout.endswith("NOT EQUAL\n")
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["equal"]
    assert found["differing_weights"] == []
    assert found["first_difference"]["step"] == {"layer": 1, "op": "linear", "call": 1, "output": "y"}
