"""Bad input: one message with cause and remedy, exit code 2, nothing half-written. No engine is started here."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zerokl.alignment import trace as trace_module
from zerokl.alignment.recorder import OPS, Plant
from zerokl.alignment.trace import Record, Step
from zerokl.alignment.verify import Mismatch
from zerokl.orchestrate import cli, models, trace, verify
from zerokl.orchestrate.errors import UserError
from zerokl.weightsync import place

RECIPES = Path(cli.__file__).resolve().parent.parent / "recipes"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory):
    return models.tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def zerokl(capsys, monkeypatch, tmp_path):
    """zerokl(arguments...) -> (exit code, stdout, stderr), in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["zerokl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run


def copy_of(model, to, **changes):
    """A copy of a model folder with some files replaced (bytes) or left out (None)."""
    to.mkdir()
    for path in model.iterdir():
        content = changes.get(path.name.replace(".", "_"), path.read_bytes())
        if content is not None:
            (to / path.name).write_bytes(content)
    return to


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from zerokl.orchestrate.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'sglang', 'ray', 'megatron', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd="/", check=True, timeout=60)


def test_missing_model(zerokl):
    code, out, err = zerokl("verify", "--model", "no-such-model")
    assert (code, out) == (2, "")
    assert "no model at 'no-such-model'" in err
    assert "zerokl model fetch" in err
    assert "Traceback" not in err


def test_unsupported_architecture(zerokl, tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    model = copy_of(tiny, tmp_path / "m", config_json=json.dumps(config).encode())
    code, _, err = zerokl("verify", "--model", model)
    assert code == 2
    assert "MambaForCausalLM is not supported" in err
    assert "LlamaForCausalLM" in err


@pytest.mark.parametrize(
    ("keep", "message"),
    [(-1, "truncated"), (100, "not a whole safetensors"), (4, "not a whole safetensors"), (None, "missing")],
)
def test_truncated_weights(zerokl, tiny, tmp_path, keep, message):
    whole = (tiny / "model.safetensors").read_bytes()
    model = copy_of(tiny, tmp_path / "m", model_safetensors=None if keep is None else whole[:keep])
    code, _, err = zerokl("verify", "--model", model)
    assert code == 2
    assert message in err
    assert "model.safetensors" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "hello"}\n{"prompt": "hel\n', "line 2: not valid JSON"),
        ("", "holds no prompt"),
        ('{"input_ids": [319]}\n{"input_ids": [320]}\n', "line 2: token 320 is outside the vocabulary"),
        (json.dumps({"prompt": "x" * 4090}), "line 1: the prompt has 4090 tokens, at most 4032 fit"),
    ],
)
def test_bad_prompt_files(zerokl, tiny, tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    code, _, err = zerokl("verify", "--model", tiny, "--prompts", "p.jsonl", "--json", "out.json")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "options", [["--top-p", "0"], ["--top-p", "1.1"], ["--temperature", "nan"], ["--max-new-tokens", "4096"],
                ["--control", "other"], ["--inject", "bits"], ["--max-new-tokens", "0"], ["--nonsense"]]
)  # fmt: skip
def test_bad_options(zerokl, tiny, options):
    assert zerokl("verify", "--model", tiny, *options)[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replay", "check"], "--replay check: LlamaForCausalLM is dense, it routes nothing"),
        (["--inject", "combine-order"], "--inject combine-order: LlamaForCausalLM is dense"),
    ],
)
def test_routing_options_need_a_sparse_model(zerokl, tiny, options, message):
    code, _, err = zerokl("verify", "--model", tiny, *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--segments", "3"], "segments=3; supported: 1, 2, 4, 8"),
        (["--rollout-tensor-parallel", "2"], "segments=1 must cover tensor=2"),
        (["--rollout-tensor-parallel", "4", "--segments", "4"], "2 key-value heads do not divide over tensor=4"),
        (["--control", "stock", "--segments", "2"], "SGLang's own kernels know no segments"),
    ],
)
def test_segments_and_ranks_that_cannot_be(zerokl, tiny, options, message):
    code, _, err = zerokl("verify", "--model", tiny, *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control", "stock", "--inject", "combine-order"], "only zerokl's own router can be faulty"),
        (["--inject", "replay-shift"], "nothing is replayed"),
        (["--inject", "tie-break", "--replay", "on"], "a replayed choice breaks no tie"),
        (["--inject", "stale-bias"], "Qwen3MoeForCausalLM has no selection bias"),
        (["--inject", "tie-break", "--rollout-tensor-parallel", "2"], "changes weights of an engine of one rank"),
    ],
)
def test_options_a_sparse_model_has_no_place_for(zerokl, tiny_moe, options, message):
    code, _, err = zerokl("verify", "--model", tiny_moe, *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transport", "rdma"], "there is no transfer\n  add --syncs N"),
        (["--faults", "random"], "there is no transfer\n  add --syncs N"),
        (["--syncs", "1", "--transport", "smoke"], "'smoke' is not known\n  known are auto, ipc, disk"),
        (
            ["--syncs", "1", "--faults", "random", "--transport", "disk"],
            "--faults damages transfers by ipc, not by disk",
        ),
    ],
)
def test_transfers_that_cannot_be(zerokl, tiny, options, message):
    code, _, err = zerokl("verify", "--model", tiny, *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("name", "needs"),
    [("cuda_ipc", "a GPU that torch sees"), ("mooncake", "pip install mooncake"), ("rdma", "pip install nixl-cu12")],
)
def test_a_transport_whose_package_or_gpu_is_missing_is_refused_before_anything_starts(
    zerokl, tiny, monkeypatch, name, needs
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(place, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(place, "MOONCAKE", "no_such_package")
    monkeypatch.setattr(verify, "start", None)  # the engine's and the policy's
    train = ["train", RECIPES / "tiny.toml", "--dry-run", "--set", f"model.name={tiny}"]
    for command in (["verify", "--model", tiny, "--syncs", "1", "--transport", name],
                    [*train, "--set", f"weightsync.transport={name}"]):  # fmt: skip
        code, out, err = zerokl(*command)
        assert (code, out) == (2, "")
        assert f"{name}: not every participant has what it needs" in err
        assert needs in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-ids", "5,six"], "'5,six': not token ids"),
        (["--input-ids", "5,320"], "token 320 is outside the vocabulary"),
        (["--prompt", "a", "--input-ids", "5"], "--prompt, --input-ids: one prompt at a time"),
        (["--prompt", "a", "--request", "1"], "--prompt and --request: one prompt at a time"),
        (["--request", "36"], "there are 36 prompts, counted from 0"),
        (["--inject-op", "nothing"], "no op is called 'nothing'"),
        (["--inject-op", "linear:x"], "no op is called 'linear:x'"),
        (["--inject-op", "linear", "--inject-layer", "2"], "the model has 2 layers"),
        (["--prompt", "a", "--max-new-tokens", "3", "--inject-op", "linear", "--inject-token", "3"], "from 0 to 2"),
        (["--top-p", "0"], "cannot sample"),
    ],
)
def test_bad_traces(zerokl, tiny, options, message):
    code, out, err = zerokl("trace", "--model", tiny, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_the_trace_of_a_failed_verification():
    settings = verify.Settings("a model", None, Path("p.jsonl"), 8, 0.5, 0.9, 3)
    found = verify.trace_command(settings, Mismatch(7, 2, 5, "", ""))
    assert found == (
        "zerokl trace --model 'a model' --prompts p.jsonl --request 7 --max-new-tokens 8 --temperature 0.5 "
        "--top-p 0.9 --seed 3"
    )
    assert "--request 0" in verify.trace_command(settings, None)
    assert verify.trace_command(replace(settings, segments=2), None).endswith("--seed 3 --segments 2")


def test_a_fault_without_a_place_names_what_runs():
    records = [Record(torch.arange(5), torch.zeros(5, 1), "linear", "")]
    there = {Step(1, "linear", 0, "y"): records, Step(1, "rotary", 0, "y"): records}
    trace._check_planted(Plant("linear", 1, 4), there)
    for plant, message in [
        (Plant("linear", 1, 4, call=1), "linear:1 does not run in layer 1\n.*linear:0, rotary:0"),
        (Plant("linear", None, 4), "linear:0 does not run outside the layers"),
        (Plant("linear", 1, 5), "computes tokens 0 to 4"),
        (Plant("linear", 1, 4, element=1), "a row of linear has 1, counted from 0"),
    ]:
        with pytest.raises(UserError, match=message):
            trace._check_planted(plant, there)


def test_the_hint_looks_where_the_difference_begins():
    value = trace_module.Value(1.0, "0x3f80", "linear", "m")
    other = trace_module.Value(1.0, "0x3f81", "linear", "m")

    def found(op, output, trainer=other):
        return trace_module.Difference(Step(0, op, 0, output), 0, 0, 1, value, trainer, 1)

    assert "prefix cache" in trace.hint(None, [])
    assert "weight synchronisation: w differ" in trace.hint(found("linear", "y"), ["w"])
    assert "residual addition" in trace.hint(found("rms_norm", "sum"), [])
    assert "page table" in trace.hint(found("attention", "out"), [])
    assert trace.hint(found("linear", "y", value), []).startswith("why the value is not finite")
    assert all(trace.hint(found(op, "y"), []) for op in OPS)


def test_a_difference_is_told_in_full():
    nan, one = (trace_module.Value(n, b, "linear", m) for n, b, m in [(math.nan, "0x7fc0", "a.b"), (1.0, "0x3f80", "")])
    found = trace_module.Difference(Step(0, "linear", 1, "y"), 5, 6, 7, nan, one, 8)
    result = {
        "equal": False, "compared": 3, "prompt_tokens": 4, "generated_tokens": 2, "differing_weights": [],
        "first_difference": json.loads(json.dumps(trace._plain(found), allow_nan=False)), "hint": "here",
    }  # fmt: skip
    printed = "\n".join(trace.lines(result))
    assert "first difference  layer 0, linear:1, y: token 5, element 6 of 7\n" in printed
    assert "rollout         0x7fc0 (not finite) by linear in a.b\n" in printed
    assert "trainer         0x3f80 (1.0) by linear in the head\n" in printed
    assert "8 elements of this output differ" in printed
    assert printed.endswith("look at           here\nNOT EQUAL")


def test_a_recipe_whose_model_cannot_do_what_it_says(zerokl, tiny, tiny_moe):
    recipe = RECIPES / "tiny.toml"
    for model, change, message in [
        (tiny, "train.routing_replay=check", "LlamaForCausalLM routes nothing"),
        (tiny_moe, "train.routing_replay=maybe", "train.routing_replay"),
        (tiny, "model.segments=3", "model.segments"),
        (tiny, "rollout.tensor_parallel=2", "segments=1 must cover tensor=2"),
    ]:
        code, _, err = zerokl("train", recipe, "--dry-run", "--set", f"model.name={model}", "--set", change)
        assert code == 2
        assert message in err
    code, out, _ = zerokl(
        "train", recipe, "--dry-run", "--set", f"model.name={tiny_moe}", "--set", "train.routing_replay=check"
    )
    assert code == 0
    assert 'routing_replay = "check"' in out


def test_a_result_that_could_not_be_written_is_refused_first(zerokl, tiny, tmp_path):
    code, _, err = zerokl("verify", "--model", tiny, "--json", tmp_path)
    assert code == 2
    assert "cannot write" in err


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(zerokl, tiny, tmp_path):
    code, out, _ = zerokl(
        "train", RECIPES / "tiny.toml", "--dry-run", "--set", f"model.name={tiny}", "--set", "train.steps=7"
    )
    assert code == 0
    assert "steps = 7" in out
    assert "chunked_prefill_tokens" in out
    assert list(tmp_path.iterdir()) == []


def test_a_bad_recipe_lists_everything_that_its_names_lack(zerokl, tmp_path):
    code, _, err = zerokl(
        "train", RECIPES / "tiny.toml", "--set", "model.name=nowhere", "--set", "reward.function=no.such.reward",
        "--set", "data.options.task=no_such_task",
    )  # fmt: skip
    assert code == 2
    for part in ("nowhere", "no.such.reward", "no_such_task"):
        assert part in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rollout.max_prompt_tokens=2", "at most 2 fit"),
        ("data.template={nothing}", "data.template fails"),
        ("reward.options.targe=3", "targe"),
        ("rollout.group_size=1", "rollout.group_size"),
    ],
)
def test_a_recipe_that_cannot_work_stops_before_anything_starts(zerokl, tiny, tmp_path, change, message):
    code, _, err = zerokl("train", RECIPES / "tiny.toml", "--set", f"model.name={tiny}", "--set", change)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_resume_of_nothing(zerokl, tiny):
    code, _, err = zerokl("train", RECIPES / "tiny.toml", "--set", f"model.name={tiny}", "--resume")
    assert code == 2
    assert "no run to resume" in err


def test_plan_prints_routes_bytes_and_seconds(zerokl, tiny):
    options = ("--trainer", "tp=2,dp=2,vocabulary_multiple=2", "--rollout", "engines=2", "--speed", "rdma=0.001")
    code, out, _ = zerokl("plan", "--model", tiny, *options, "--json", "plan.json")
    assert code == 0
    result = json.loads(Path("plan.json").read_text())
    assert result["bytes"] == 2 * result["model_bytes"] == sum(route["bytes"] for route in result["routes"])
    assert {(r["trainer"], r["rollout"]) for r in result["routes"]} == {(t, r) for t in range(4) for r in range(2)}
    assert result["seconds"]["rdma"] == result["model_bytes"] / 1e6  # what one engine receives, over its own link
    assert result["digest"] in out
    assert f"{result['seconds']['rdma']:.3f} s predicted" in out


def test_plan_of_a_quantised_wire_form_prints_what_it_saves_and_what_links_allow(zerokl, tiny):
    options = ("--rollout", "engines=2", "--wire", "mxfp8", "--links", "nic=0.001,gpus_per_node=1")
    code, out, _ = zerokl("plan", "--model", tiny, *options, "--json", "plan.json")
    assert code == 0
    result = json.loads(Path("plan.json").read_text())
    saved = result["bf16_bytes"] - result["bytes"]
    assert 0 < saved < result["bf16_bytes"] / 2  # codes are half as large, scales come on top, embeddings stay
    assert f"mxfp8: {saved / 1e6:.1f} MB less than bf16" in out
    assert result["links"]["seconds"] == result["bytes"] / 1e6  # one trainer rank sends to both engines
    assert "the busiest is nic out of trainer-0" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wire", "fp4"], "'fp4' is not a wire form"),
        (["--wire", "fp8_block", "--rollout", "tp=2"], "cut blocks of 128"),
        (["--links", "nic=0"], "speeds and GPUs per node must be positive"),
        (["--links", "wire=1"], "'wire=1' are no links"),
        (["--model-shape", "kimi-k2"], "there is no model to plan for, or there are two"),
        (["--trainer", "pp=3"], "do not divide"),
        (["--trainer", "cp=2"], "'cp=2' is not a size"),
        (["--rollout", "tp=-1"], "'tp=-1' is not a size"),
        (["--speed", "ipc=nan"], "'ipc=nan' is not a speed"),
        (["--model", "nowhere"], "config.json is not a usable model configuration"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(zerokl, tiny, options, message):
    code, _, err = zerokl("plan", "--model", tiny, *options)
    assert code == 2
    assert message in err


def test_report_of_nothing(zerokl):
    code, _, err = zerokl("report", "nowhere")
    assert code == 2
    assert "no metrics.jsonl" in err


def test_tiny_models_are_whole_reproducible_and_never_replace_a_strangers_folder(zerokl, tmp_path):
    for out in ("a", "b"):
        assert zerokl("model", "tiny", "qwen3", "--out", out)[0] == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    code, _, err = zerokl("model", "tiny", "llama", "--out", "mine")
    assert code == 2
    assert "was not made by" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "mine"]


def test_unknown_model_name(zerokl):
    code, _, err = zerokl("model", "fetch", "gpt-5")
    assert code == 2
    assert "smollm2-135m" in err


def test_fetch_is_verified_idempotent_and_repairs(zerokl, tmp_path):
    assert zerokl("model", "fetch", "smollm2-135m", "--out", "m")[0] == 0
    weights = tmp_path / "m/model.safetensors"
    made = weights.stat().st_mtime_ns
    assert zerokl("model", "fetch", "smollm2-135m", "--out", "m")[0] == 0
    assert weights.stat().st_mtime_ns == made
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert zerokl("model", "fetch", "smollm2-135m", "--out", "m")[0] == 0
    assert weights.stat().st_mtime_ns != made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_doctor_as_json(zerokl):
    code, out, _ = zerokl("doctor", "--json")
    facts = json.loads(out)
    assert code == (0 if facts["runnable"] else 1)
    assert facts["working"] == {"extension": True, "sglang": True, "megatron": True, "ray": True}
    assert facts["versions"]["sglang"] == "0.5.23"
