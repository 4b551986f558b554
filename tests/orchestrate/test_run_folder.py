"""Run folders, metrics and reports: whole lines, one writer, exact resumes."""

import base64
import dataclasses
import json
import subprocess
import sys

import pytest

from zerokl.orchestrate import metrics, report
from zerokl.orchestrate.config import load
from zerokl.orchestrate.errors import UserError
from zerokl.orchestrate.run_folder import RunFolder, locate, to_toml

RECIPE = """
[model]
name = "m"
[train]
steps = 4
betas = [0.8, 0.9]
[data]
source = "a.b"
template = "say \\"{prompt}\\"\\n→"
options = { task = "x", sizes = [1, 2], nested = { deep = true } }
[reward]
function = "c.d"
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return load(path)


def step(number, **changes):
    values = {
        f.name: 0 if f.type == "int" else 0.0
        for f in dataclasses.fields(metrics.StepMetrics)
        if f.default is dataclasses.MISSING
    }
    values |= {"step": number, "reward_mean": number / 10, "tokens": 100, "step_s": 2.0, "weight_version": str(number)}
    return metrics.StepMetrics(**(values | changes))


def test_resolved_recipe_reads_back_the_same(config, tmp_path):
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load(tmp_path / "again.toml") == config


def test_a_second_writer_is_refused(config, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin(config, resume=False)
        code = (
            "from pathlib import Path; from zerokl.orchestrate.run_folder import RunFolder\n"
            f"RunFolder(Path({str(tmp_path / 'run')!r}))"
        )
        other = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
        assert "another run is writing" in other.stderr
    with RunFolder(tmp_path / "run"):
        pass


def test_a_run_is_neither_overwritten_nor_resumed_with_another_recipe(config, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(UserError, match="no run to resume"):
            folder.begin(config, resume=True)
        folder.begin(config, resume=False)
        metrics.MetricsFile(folder.path, keep_through=0).close()
        with pytest.raises(UserError, match="already holds a run"):
            folder.begin(config, resume=False)
        longer = load(tmp_path / "recipe.toml", ["train.steps=9", "run.checkpoint_every=1"])
        assert folder.begin(longer, resume=True) is None
        for change in ("train.learning_rate=0.5", "run.seed=3", "data.source=x.y"):
            with pytest.raises(UserError, match=change.split("=", maxsplit=1)[0]):
                folder.begin(load(tmp_path / "recipe.toml", [change]), resume=True)


def test_checkpoints_are_whole_or_absent(tmp_path):
    def save(folder):
        folder.mkdir()
        (folder / "weights").write_text("w")
        return {"w": "1"}

    def fail(folder):
        save(folder)
        raise OSError("disk full")

    with RunFolder(tmp_path / "run") as folder:
        assert folder.latest() is None
        for number in (1, 2, 3):
            folder.new_checkpoint(number, save, keep=2)
        with pytest.raises(OSError, match="disk full"):
            folder.new_checkpoint(4, fail, keep=2)
        assert [c.step for c in folder.checkpoints()] == [2, 3]
        assert folder.latest().weights_digest == {"w": "1"}
        assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_metrics_are_whole_lines_and_resume_drops_later_steps(tmp_path):
    file = metrics.MetricsFile(tmp_path, keep_through=0)
    for number in (1, 2, 3):
        file.append(step(number, kl_k3=float("nan")))
    file.close()
    with (tmp_path / metrics.FILE).open("a") as torn:
        torn.write('{"step": 4, "rew')
    assert [s["step"] for s in metrics.read(tmp_path)] == [1, 2, 3]
    assert metrics.read(tmp_path)[0]["kl_k3"] is None
    metrics.MetricsFile(tmp_path, keep_through=2).close()
    assert [json.loads(line)["step"] for line in (tmp_path / metrics.FILE).read_text().splitlines()] == [1, 2]


def test_report_shows_reward_and_control(config, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.begin(config, resume=False)
        file = metrics.MetricsFile(folder.path, keep_through=0)
        for number in range(1, 9):
            file.append(step(number))
        file.close()
        control = {
            "tokens": 50,
            "mismatched_tokens": 49,
            "max_abs_diff": 0.25,
            "kl": {"k1": 1e-3, "k2": 2e-3, "k3": 3e-3},
            "gap": {"extremes": [{"sample": 3, "position": 4, "token": 777, "rollout": -1.25, "trainer": -1.5}]},
        }
        (folder.path / report.CONTROL).write_text(json.dumps(control))
        page, png = report.write(folder.path)
    text = page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert base64.b64encode(png.read_bytes()).decode() in text
    for part in (
        "every log-probability equal",
        "0.1500",
        "0.7500 (+0.6000)",
        "0.003",
        "&quot;{prompt}",
        "<td>777</td><td>-1.25</td>",
    ):
        assert part in text


def test_report_says_so_when_bits_differ(tmp_path):
    file = metrics.MetricsFile(tmp_path, keep_through=0)
    file.append(step(1, mismatched_tokens=1, max_abs_diff=float("nan"), kl_k3=float("nan"), kl_k1=float("nan")))
    file.close()
    nothing = {"tokens": 5, "mismatched_tokens": 5, "max_abs_diff": None, "kl": {"k1": None, "k2": None, "k3": None}}
    nothing["gap"] = {"extremes": [{"sample": 0, "position": 0, "token": 1, "rollout": None, "trainer": -1.5}]}
    (tmp_path / report.CONTROL).write_text(json.dumps(nothing))
    text = report.write(tmp_path)[0].read_text()
    assert "NOT equal" in text
    assert "not finite" in text


def test_report_needs_a_finished_step(tmp_path):
    with pytest.raises(UserError, match="no metrics"):
        report.write(tmp_path)
    metrics.MetricsFile(tmp_path, keep_through=0).close()
    with pytest.raises(UserError, match="no finished step"):
        report.write(tmp_path)


def test_time_in_the_folder_name(tmp_path):
    pattern = str(tmp_path / "runs" / "demo-{time}")
    with pytest.raises(UserError, match="no run matches"):
        locate(pattern, resume=True)
    fresh = locate(pattern, resume=False)
    assert fresh.parent == tmp_path / "runs"
    (tmp_path / "runs" / "demo-20200101-000000").mkdir(parents=True)
    fresh.mkdir()
    assert locate(pattern, resume=True) == fresh
    assert locate(str(tmp_path / "plain"), resume=True) == tmp_path / "plain"
