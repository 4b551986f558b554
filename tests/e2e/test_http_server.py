"""SGLang's own server, `python -m sglang.launch_server`: with the plugin installed it takes weights like any engine."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict

import torch
from safetensors.torch import load_file

from zerokl import weightsync
from zerokl.alignment.sglang import cpu_shims
from zerokl.alignment.sglang.config import TRANSFER_KEY
from zerokl.orchestrate.weights import Meeting, WeightLink


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, path: str, **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


@contextlib.contextmanager
def server(model, meeting, log):
    """A server of the model that waits for weights at ``meeting``; yields its port."""
    port, on_cpu = free_port(), not torch.cuda.is_available()
    options = {
        "model-path": model, "port": port, "attention-backend": "zerokl", "max-total-tokens": 4096,
        "context-length": 256, "json-model-override-args": json.dumps({TRANSFER_KEY: asdict(meeting.transfer())}),
        "device": "cpu" if on_cpu else "cuda", "log-level": "warning",
    }  # fmt: skip
    switches = ["--skip-tokenizer-init", "--disable-overlap-schedule", "--disable-cuda-graph", "--skip-server-warmup"]
    command = [sys.executable, "-m", "sglang.launch_server", *switches]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    paths = [os.environ.get("PYTHONPATH", ""), *(cpu_shims.__path__ if on_cpu else [])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "SGLANG_USE_CPU_ENGINE": str(int(on_cpu)),
        "OMP_NUM_THREADS": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=log.parent, start_new_session=True
        )
    try:
        end = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                ask(port, "/get_model_info")
                break
            time.sleep(0.2)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def test_a_server_samples_from_the_weights_it_was_sent(model_folder, tmp_path):
    model, meeting = model_folder("tiny-llama"), Meeting.in_folder(tmp_path)
    tensors = {name: tensor * 1.25 for name, tensor in load_file(model / "model.safetensors").items()}
    request = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}
    with (
        WeightLink(meeting, *weightsync.named_layout(tensors)) as link,
        server(model, meeting, tmp_path / "server.log") as port,
    ):
        before = ask(port, "/generate", return_logprob=True, **request)["meta_info"]
        report = link.sync("1", timeout_s=60)
        after = ask(port, "/generate", return_logprob=True, **request)["meta_info"]
        state = ask(port, "/get_server_info")["internal_states"][0]["zerokl"][0]
    assert report.copied_by_engines == 0
    assert before["weight_version"] == "default"
    assert after["weight_versions"] == [{"version": "1", "start": 0, "end": 8}]
    assert after["output_token_logprobs"][0][0] != before["output_token_logprobs"][0][0]
    assert state["weights"] == {"state": "idle", "version": "1"}
    assert all(hook["intact"] for hook in state["hooks"])
