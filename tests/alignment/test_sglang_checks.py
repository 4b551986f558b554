"""What the SGLang binding refuses before, or without, starting an engine."""

import base64
import json
import shutil
import socket
import struct
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from zerokl.alignment.routing import RoutingError
from zerokl.alignment.sglang import EngineConfig, RolloutEngine, protocol
from zerokl.alignment.sglang.config import inspect_model
from zerokl.alignment.sglang.engine_child import _require, _routed
from zerokl.alignment.sglang.errors import EngineError, HookError, UnsupportedError
from zerokl.alignment.sglang.report import check_reports
from zerokl.alignment.types import Request, SamplingParams


@pytest.fixture
def model(tiny_models, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_models["llama"], tmp_path / "model"))


def edit(model: Path, **changes) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_good_model_is_described(model):
    info = inspect_model(str(model))
    assert (info.architecture.name, info.vocab_size, info.max_positions) == ("LlamaForCausalLM", 320, 512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM is not supported; supported: Llama"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary scaling 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unsupported_models_are_named(model, changes, message):
    edit(model, **changes)
    with pytest.raises(UnsupportedError, match=message):
        RolloutEngine(EngineConfig(str(model)))


def test_a_sparse_model_is_described(tiny_models):
    assert inspect_model(str(tiny_models["llama"])).router is None
    router = inspect_model(str(tiny_models["glm4-moe"])).router
    assert (router.experts, router.top_k, router.first_layer, router.sparse_layers) == (16, 4, 1, 1)
    assert (router.scoring, router.groups, router.keep_groups, router.scale) == ("sigmoid", 4, 2, 2.5)


def test_a_sparse_model_of_an_unknown_kind_is_refused(tiny_models, tmp_path):
    folder = Path(shutil.copytree(tiny_models["qwen3-moe"], tmp_path / "moe"))
    edit(folder, mlp_only_layers=[1])
    with pytest.raises(UnsupportedError, match="every layer must be sparse"):
        inspect_model(str(folder))


def test_only_a_sparse_model_has_experts_to_capture(model):
    with pytest.raises(UnsupportedError, match="capture_experts: LlamaForCausalLM is dense"):
        RolloutEngine(EngineConfig(str(model), context_length=256, capture_experts=True))


def test_captured_experts_leave_as_bytes_or_not_at_all(tiny_models):
    router = inspect_model(str(tiny_models["glm4-moe"])).router
    captured = np.zeros((4, 2, 4), "<i4")  # prompt of 2, answer of 3: 4 tokens were fed; the first layer is dense
    captured[:, 1] = [3, 0, 15, 7]
    encoded = base64.b64encode(captured.tobytes()).decode()
    result = {"output_ids": [1, 2, 3], "meta_info": {"routed_experts": encoded}}
    assert _routed(0, 2, result, router) == bytes([3, 0, 15, 7] * 4)
    with pytest.raises(RoutingError, match="request 5: 32 expert indices were captured"):
        _routed(5, 3, result, router)
    with pytest.raises(RoutingError, match="request 5: 0 expert indices were captured"):
        _routed(5, 2, result | {"meta_info": {}}, router)


def test_damaged_models_are_refused(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        inspect_model(str(model))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*safetensors"):
        inspect_model(str(model))
    (model / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        inspect_model(str(model))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_model(str(model / "nowhere"))


def test_a_context_beyond_the_model_is_refused(model):
    with pytest.raises(ValueError, match="context_length 513 exceeds the model's 512 positions"):
        RolloutEngine(EngineConfig(str(model), context_length=513))


@pytest.mark.parametrize("options", [{"radix_cache": True}, {"radix_cache": False, "stock": True}])
def test_a_trace_needs_our_kernels_and_every_token(model, options):
    with pytest.raises(UnsupportedError, match="trace: needs zerokl's kernels"):
        EngineConfig(str(model), trace=True, **options)


def test_refusals_of_sglang_are_errors():
    _require("begin_weight_update", (True, "Success"))
    with pytest.raises(EngineError, match="SGLang refused begin_weight_update: already open"):
        _require("begin_weight_update", (False, "already open"))


REPORT = {
    "rank": 0,
    "forwards": 2,
    "sampled": "",
    "hooks": [
        {"hook": "linear", "op": "linear", "sites": 8, "per_forward": 8, "calls": 16, "intact": True},
        {"hook": "sample", "op": "sample", "sites": 1, "per_forward": 1, "calls": 2, "intact": True},
    ],
}


def test_hook_reports_are_judged():
    check_reports([REPORT], 1)
    for broken, message in [
        (None, "reports no zerokl binding"),
        (REPORT | {"forwards": 1}, "needs a prefill and a decode step"),
        (REPORT | {"hooks": [REPORT["hooks"][0] | {"calls": 15}]}, "'linear' did not take effect: 15 calls"),
        (REPORT | {"hooks": [REPORT["hooks"][0] | {"intact": False}]}, "'linear' did not .* replaced it since"),
    ]:
        with pytest.raises(HookError, match=message):
            check_reports(broken and [broken], 1)


def test_every_rank_is_judged():
    second = REPORT | {"rank": 1}
    check_reports([REPORT, second], 2)
    lazy = second | {"hooks": [REPORT["hooks"][0] | {"calls": 15}]}
    for broken, message in [
        ([REPORT], r"ranks \[0\] report a binding, 0 to 1 expected"),
        ([REPORT, REPORT], r"ranks \[0, 0\] report"),
        ([REPORT, lazy], "'linear' did not take effect on rank 1: 15 calls"),
        ([REPORT, second | {"forwards": 4, "hooks": []}], r"ranks differ in forwards: \[2, 4\]"),
        ([REPORT, second | {"sampled": "other"}], "ranks differ in sampled"),
    ]:
        with pytest.raises(HookError, match=message):
            check_reports(broken, 2)


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def test_messages_arrive_as_sent(ends):
    sender = protocol.Connection(ends[0], protocol.Reply)
    receiver = protocol.Connection(ends[1], protocol.Command)
    request = Request((1, 2), SamplingParams(temperature=0.1, stop_token_ids=(3,)), arrival_s=0.5)
    for message in (protocol.Generate((request,)), protocol.Start(EngineConfig("m")), protocol.Close()):
        sender.send(message)
        assert receiver.receive() == message


def test_foreign_messages_are_refused(ends):
    receiver = protocol.Connection(ends[1], protocol.Command)
    for foreign in ({"type": "Done"}, {"type": "FlipWeightBit", "name": 3, "element": 0, "bit": 0}, [1]):
        body = msgspec.msgpack.encode(foreign)
        ends[0].sendall(struct.pack("<Q", len(body)) + body)
        with pytest.raises(msgspec.ValidationError):
            receiver.receive()
    ends[0].sendall(struct.pack("<Q", 1 << 40))
    with pytest.raises(ConnectionError, match="exceeds the limit"):
        receiver.receive()


def test_waits_end(ends):
    receiver = protocol.Connection(ends[1], protocol.Command)
    with pytest.raises(TimeoutError):
        receiver.receive(time.monotonic() + 0.05)
    ends[0].close()
    with pytest.raises(protocol.ConnectionClosed):
        receiver.receive(time.monotonic() + 1)
