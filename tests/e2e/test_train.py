"""Whole runs of `zerokl train` on a tiny model: Ray actors, SGLang, Megatron-Core, weight sync, checkpoints, report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import zerokl

ROOT = Path(zerokl.__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
ZEROKL = str(Path(sys.executable).parent / "zerokl")
STEPS = 4
# a deterministic reward that fails on some responses: those samples are dropped, in every run the same ones
REWARD = """
def reward(task, response):
    if len(response) % 5 == 0:
        raise ValueError("no opinion")
    return min(1.0, response.count("a") / 4 + len(set(response)) / 64)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "recipe.toml").write_text((RECIPES / "tiny.toml").read_text())
    (folder / "mine.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def command(folder, model_folder):
    """command(run, arguments...) -> the command line of a training run"""

    def make(run: str, *arguments: str) -> list[str]:
        settings = {
            "model.name": model_folder("tiny-llama"), "train.steps": STEPS, "reward.function": "mine.py:reward",
            "reward.options": "{}", "run.directory": run,
        }  # fmt: skip
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return [ZEROKL, "train", "recipe.toml", *sets, *arguments]

    return make


@pytest.fixture(scope="module")
def whole(folder, command):
    """A run without interruption, with its control."""
    done = subprocess.run(
        command("whole", "--set", "control.enabled=true", "--set", "run.tensorboard=true"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + logs(folder / "whole")
    return folder / "whole", done.stdout


@pytest.fixture(scope="module")
def sparse(folder, command, model_folder):
    """Two steps of a mixture-of-experts model along the rollout's experts, recomputed."""
    settings = {
        "model.name": model_folder("tiny-qwen3_moe"), "train.steps": 2, "train.routing_replay": "check",
        "train.recompute": "true",
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        command("sparse", *sets), cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + logs(folder / "sparse")
    return folder / "sparse"


@pytest.fixture(scope="module")
def resumed(folder, command):
    """The same run over `collective`, stopped by Ctrl-C during its second step, and continued over `disk`."""
    run = folder / "stopped"
    # a session of its own: the signal reaches every process of the group, as Ctrl-C in a terminal does
    process = subprocess.Popen(
        command("stopped", "--set", "weightsync.transport=collective"),
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: steps(run), "the first step", process)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    state = {"code": process.returncode, "output": output, "steps": len(steps(run)), "family": family}
    again = subprocess.run(
        command("stopped", "--resume", "--set", "weightsync.transport=disk"),
        cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr + logs(run)
    return run, state


@pytest.fixture(scope="module")
def bereaved(folder, command):
    """A run of two engines over `rdma`, one of which is killed after the first step; (run folder, what it printed, the
    killed one)."""
    run = folder / "bereaved"
    process = subprocess.Popen(
        command("bereaved", "--set", "weightsync.transport=rdma", "--set", "rollout.engines=2"),
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until(lambda: steps(run), "the first step", process)
        family = psutil.Process(process.pid).children(recursive=True)
        scheduler, _ = [child for child in family if "scheduler" in " ".join(child.cmdline()[:1])]
        scheduler.kill()
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output + logs(run)
    return run, output, scheduler


def test_every_step_agrees_bit_for_bit(whole):
    recorded = steps(whole[0])
    assert [s["step"] for s in recorded] == [1, 2, 3, 4]
    for s in recorded:
        assert s["tokens"] > 0
        assert (s["mismatched_tokens"], s["max_abs_diff"], s["kl_k1"], s["kl_k3"]) == (0, 0.0, 0.0, 0.0)
        assert s["weight_version"] == str(s["step"])
        assert s["sync_bytes"] > 1_000_000
        assert s["sync_transport"] == "ipc"
        assert 0 < s["sync_copied_bytes"] < s["sync_bytes"] / 2  # only what Megatron and SGLang lay out differently
        assert s["sync_engine_copied_bytes"] == 0
        assert s["sync_pause_ms"] > 0
    assert any(s["grad_norm"] > 0 for s in recorded)


def test_a_sparse_model_agrees_along_the_rollouts_experts(sparse):
    recorded = steps(sparse)
    assert [s["step"] for s in recorded] == [1, 2]
    for s in recorded:
        assert s["tokens"] > 0
        assert (s["mismatched_tokens"], s["max_abs_diff"], s["kl_k3"]) == (0, 0.0, 0.0)
        assert s["differing_routes"] == 0


def test_four_trainer_ranks_and_two_engine_ranks_agree(folder, command):
    """Each engine rank gets its weights from the trainer ranks that hold them, and maps them without a copy."""
    run, parallel = folder / "ranks", {"train.parallel.tensor": 2, "train.parallel.pipeline": 2}
    sets = {"model.segments": 2, "rollout.tensor_parallel": 2, "train.steps": 2, **parallel}
    done = subprocess.run(
        command("ranks", *(part for key, value in sets.items() for part in ("--set", f"{key}={value}"))),
        cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + logs(run)
    for s in steps(run):
        assert (s["mismatched_tokens"], s["max_abs_diff"], s["sync_engine_copied_bytes"]) == (0, 0.0, 0)
        assert s["tokens"] > 0
        assert s["grad_norm"] > 0
    assert (run / "logs" / "trainer-3.log").is_file()
    assert (run / "model" / "model.safetensors").is_file()


def test_failing_rewards_drop_their_samples(whole):
    recorded = steps(whole[0])
    assert sum(s["dropped"] for s in recorded) > 0
    assert all(s["samples"] == 8 for s in recorded)


def test_the_run_folder_holds_everything(whole):
    run, output = whole
    for name in ("config.toml", "metrics.jsonl", "report.html", "report.png", "control.json", "model/model.safetensors",
                 "logs/rollout.log", "logs/trainer.log", "checkpoints/step-000004/state.json"):  # fmt: skip
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events.*"))
    assert output.count("0/") >= STEPS
    control = json.loads((run / "control.json").read_text())
    assert control["mismatched_tokens"] > 0
    assert control["kl"]["k3"] > 0


def test_every_metric_is_documented(whole):
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for name in steps(whole[0])[0] if f"`{name}`" not in text] == []


def test_ctrl_c_finishes_the_step_and_leaves_no_process(resumed):
    _, state = resumed
    assert state["code"] == 130
    assert "stopping after this step" in state["output"]
    assert 1 <= state["steps"] < STEPS
    assert state["family"], "the run had no child processes"
    assert [p for p in state["family"] if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_run_of_two_engines_outlives_one_and_ends_with_the_bits_of_a_run_with_one(whole, bereaved):
    run, output, scheduler = bereaved
    assert not scheduler.is_running()
    assert "an engine had died; started another one" in output
    assert (run / "logs" / "rollout-1.log").is_file()
    for name in ("model/model.safetensors", "checkpoints/step-000004/policy/optimizer.safetensors"):
        assert (whole[0] / name).read_bytes() == (run / name).read_bytes(), name
    assert [s["mismatched_tokens"] for s in steps(run)] == [0] * STEPS


def test_every_transport_carried_a_run_to_the_same_bits(whole, resumed, bereaved):
    """That they are the same, the tests around this one say."""
    assert "MB by ipc (host memory of one host) at " in whole[1]
    assert "MB by rdma (asked for by name) at " in bereaved[1]
    assert {s["sync_transport"] for s in steps(bereaved[0])} == {"rdma"}
    before = resumed[1]["steps"]
    assert [s["sync_transport"] for s in steps(resumed[0])] == ["collective"] * before + ["disk"] * (STEPS - before)


def test_a_resumed_run_ends_with_the_same_bits(whole, resumed):
    for name in ("model/model.safetensors", "checkpoints/step-000004/policy/optimizer.safetensors"):
        assert (whole[0] / name).read_bytes() == (resumed[0] / name).read_bytes(), name
    timings = {"rollout_s", "reward_s", "train_s", "sync_s", "step_s", "tokens_per_s", "cached_tokens"}
    timings |= {name for name in steps(whole[0])[0] if name.startswith("sync_") and name != "sync_bytes"}
    for one, other in zip(steps(whole[0]), steps(resumed[0]), strict=True):
        assert {k: v for k, v in one.items() if k not in timings} == {
            k: v for k, v in other.items() if k not in timings
        }


def steps(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logs(run: Path) -> str:
    return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in (run / "logs").glob("*.log"))


def until(condition, what: str, process: subprocess.Popen, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.1)
