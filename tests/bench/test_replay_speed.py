"""The benchmark of routing replay runs, on records that all modes route alike, and counts bytes."""

import json
import subprocess
import sys

import pytest

from zerokl.alignment.routing import Router
from zerokl.bench.replay_speed import bytes_per_token
from zerokl.orchestrate import tiny


def test_it_runs_on_a_sparse_model(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out.json"
    model.mkdir()
    tiny.make("qwen3_moe", model, seed=0)
    sizes = ["--sequences", "2", "--length", "16", "--rounds", "1", "--recompute"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "zerokl.bench.replay_speed", "--model", str(model), "--json", str(out), *sizes],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in ("machine:", "versions:", "command:"):
        assert line in done.stdout
    found = json.loads(out.read_text())
    assert found["step_s"].keys() == found["overhead"].keys() == {"off", "on", "check"}
    assert found["overhead"]["off"] == {"wall": 0, "cpu": 0}
    assert found["bytes_per_token"]["packed"] == 2 * 3


@pytest.mark.parametrize(("experts", "packed"), [(128, 48 * 8), (512, 2 * 48 * 8)])
def test_bytes_of_a_token(experts, packed):
    """Four bytes an index, four thirds of that in base64: 16 / 3 times as many as one byte."""
    ours, theirs = bytes_per_token(Router(experts=experts, top_k=8, first_layer=0, layers=48))
    assert ours == packed
    assert theirs == pytest.approx(48 * 8 * 16 / 3, rel=1e-3)
