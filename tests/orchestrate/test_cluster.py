"""The private Ray cluster: loopback only, a token, deadlines, errors with names, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    script = Path(__file__).with_name("cluster_script.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": str(folder)}


def test_nobody_outside_can_reach_it(outcome):
    assert {ip.removeprefix("::ffff:") for ip in outcome["listening"]} == {"127.0.0.1"}
    assert outcome["with_token"] == ""
    assert "Authentication" in outcome["no_token"]
    assert "Authentication" in outcome["wrong_token"]


def test_workers_see_the_run_folder_not_the_current_one(outcome):
    assert "/" not in outcome["path"]
    assert outcome["nice"] == 0


def test_errors_keep_their_meaning(outcome):
    assert outcome["bad_input"] == "UserError: cause\n  remedy"
    assert outcome["broken"].startswith("RunError: arithmetic failed: ZeroDivisionError: by zero")
    assert outcome["late"].startswith("RunError: waited 2 s for sleep")
    assert outcome["dead"].startswith("RunError: the process died during death")
    assert outcome["folder"] in outcome["dead"]
    assert "sleep" in outcome["waits"]


def test_nothing_is_left_running(outcome):
    assert outcome["left"] == []
