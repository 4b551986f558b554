"""`zerokl train` on a Ray cluster of two hosts, which share nothing but files and a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import zerokl

ADDRESS, REFUSED = "10.0.0.1:6379", 77  # of two_hosts.py
ROOT = Path(zerokl.__file__).resolve().parent.parent
ZEROKL = str(Path(sys.executable).parent / "zerokl")
# three CPUs and one: the engine and the trainer's first rank on one host, its second rank on the other
SETTINGS = {
    "train.steps": 2, "train.threads": 1, "train.parallel.pipeline": 2, "rollout.threads": 2,
    "cluster.address": ADDRESS,
}  # fmt: skip


def test_weights_and_gradients_cross_between_hosts_and_no_bit_differs(tmp_path, model_folder):
    sets = SETTINGS | {"model.name": model_folder("tiny-llama"), "run.directory": tmp_path / "run"}
    command = [ZEROKL, "train", ROOT / "recipes" / "tiny.toml"]
    command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    script = Path(__file__).with_name("two_hosts.py")
    done = subprocess.run(
        [sys.executable, "-P", script, *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode == REFUSED:
        pytest.skip(f"this kernel gives users no namespaces of their own: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by collective (several hosts, and no faster way between all of them)" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(s["step"], s["weight_version"], s["mismatched_tokens"], s["kl_k3"]) for s in steps] == [
        (1, "1", 0, 0.0), (2, "2", 0, 0.0),
    ]  # fmt: skip
    assert all(s["tokens"] > 0 and s["grad_norm"] > 0 for s in steps)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert list((tmp_path / "run").glob("meeting-*")) == []
