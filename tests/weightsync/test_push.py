"""`push` against engines that fail in every way an engine can, and the functions SGLang calls by name."""

import json
from pathlib import Path

import pytest
import torch

from zerokl.weightsync import sglang_loader
from zerokl.weightsync.digest import combined, tensor_digest
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.push import push
from zerokl.weightsync.shared import SHARED_MEMORY, publish

HIDDEN, HEADS, KV, DIM, FFN, VOCAB = 8, 2, 1, 4, 6, 10


class Attention(torch.nn.Module):
    """SGLang's fused attention, as far as names and shapes go."""

    def __init__(self) -> None:
        super().__init__()
        self.q_size, self.kv_size = HEADS * DIM, KV * DIM
        self.qkv_proj = torch.nn.Linear(HIDDEN, self.q_size + 2 * self.kv_size, dtype=torch.bfloat16)
        self.o_proj = torch.nn.Linear(self.q_size, HIDDEN, bias=False, dtype=torch.bfloat16)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = torch.nn.Module()
        self.mlp.gate_up_proj = torch.nn.Linear(HIDDEN, 2 * FFN, bias=False, dtype=torch.bfloat16)
        self.embed_tokens = torch.nn.Embedding(16, HIDDEN, dtype=torch.bfloat16)  # padded from VOCAB
        self.embed_tokens.org_vocab_size = VOCAB  # type: ignore[assignment]
        self.lm_head = self.embed_tokens  # tied


class Engine:
    """Loads into a model in this process, through the functions SGLang would call."""

    def __init__(self, folder: Path) -> None:
        self.model, self.folder = Model(), folder

    def load_weights(self, manifest: str, *, version: str, timeout_s: float) -> dict[str, str]:  # noqa: ARG002
        return call(sglang_loader.load, self.model, self.folder, manifest=json.loads(manifest))


def call(function, model: Model, folder: Path, **request):
    answer = folder / "answer.json"
    payload = torch.frombuffer(bytearray(json.dumps(request | {"answer": str(answer)}).encode()), dtype=torch.uint8)
    function(model, [("request", payload)])
    result = json.loads(answer.read_text())
    answer.unlink()
    if "error" in result:
        raise RuntimeError(result["error"])
    return result["result"]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN), "self_attn.q_proj.bias": (HEADS * DIM,),
        "self_attn.k_proj.weight": (KV * DIM, HIDDEN), "self_attn.k_proj.bias": (KV * DIM,),
        "self_attn.v_proj.weight": (KV * DIM, HIDDEN), "self_attn.v_proj.bias": (KV * DIM,),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj.weight": (FFN, HIDDEN), "mlp.up_proj.weight": (FFN, HIDDEN),
        "embed_tokens.weight": (VOCAB, HIDDEN),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def test_fused_parameters_get_their_parts(tmp_path, weights):
    engine = Engine(tmp_path)
    report = push(weights.items(), engine, version="v1", timeout_s=5)
    attention = engine.model.self_attn
    parts = [weights[f"self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(attention.qkv_proj.weight, torch.cat(parts))
    parts = [weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(engine.model.mlp.gate_up_proj.weight, torch.cat(parts))
    assert torch.equal(engine.model.embed_tokens.weight[:VOCAB], weights["embed_tokens.weight"])
    assert report.version == "v1"
    assert report.digest == combined({name: tensor_digest(t) for name, t in weights.items()})
    assert not list(SHARED_MEMORY.glob("zerokl-weights-*"))


def test_an_engine_that_holds_other_weights_is_found_out(tmp_path, weights):
    class Wrong(Engine):
        def load_weights(self, manifest, *, version, timeout_s):
            digests = super().load_weights(manifest, version=version, timeout_s=timeout_s)
            return digests | {"self_attn.o_proj.weight": "0" * 32}

    with pytest.raises(WeightSyncError, match=r"'self_attn.o_proj.weight' differs after the sync"):
        push(weights.items(), Wrong(tmp_path), version="v1", timeout_s=5)
    assert not list(SHARED_MEMORY.glob("zerokl-weights-*"))


def test_an_engine_that_reports_fewer_tensors_is_found_out(tmp_path, weights):
    class Partial(Engine):
        def load_weights(self, manifest, *, version, timeout_s):
            digests = super().load_weights(manifest, version=version, timeout_s=timeout_s)
            return {name: value for name, value in digests.items() if "q_proj" not in name}

    with pytest.raises(WeightSyncError, match=r"q_proj.*engine absent"):
        push(weights.items(), Partial(tmp_path), version="v1", timeout_s=5)


@pytest.mark.parametrize("error", [RuntimeError("refused"), TimeoutError("too slow")])
def test_a_refusal_reaches_the_caller_and_leaves_no_file(tmp_path, weights, error):
    class Refusing(Engine):
        def load_weights(self, *_, **__):
            raise error

    expected = TimeoutError if isinstance(error, TimeoutError) else WeightSyncError
    with pytest.raises(expected, match=str(error)):
        push(weights.items(), Refusing(tmp_path), version="v1", timeout_s=5)
    assert not list(SHARED_MEMORY.glob("zerokl-weights-*"))


def test_a_failed_load_changes_nothing(tmp_path, weights):
    engine = Engine(tmp_path)
    before = call(sglang_loader.digest, engine.model, tmp_path)
    short = weights | {"embed_tokens.weight": torch.zeros(16, HIDDEN, dtype=torch.bfloat16)}
    with (
        publish(short.items(), version="v") as manifest,
        pytest.raises(RuntimeError, match=r"'embed_tokens.weight': sent .*\(16, 8\), the engine holds .*\(10, 8\)"),
    ):
        engine.load_weights(manifest.to_json(), version="v", timeout_s=5)
    assert call(sglang_loader.digest, engine.model, tmp_path) == before


def test_flip_bit_flips_exactly_one(tmp_path):
    model = Model()
    before = model.self_attn.qkv_proj.weight.detach().clone()
    call(sglang_loader.flip_bit, model, tmp_path, name="self_attn.k_proj.weight", element=5, bit=15)
    after = model.self_attn.qkv_proj.weight.detach()
    changed = (before.view(torch.int16) ^ after.view(torch.int16)).view(-1)
    row = HEADS * DIM * HIDDEN + 5
    assert changed.nonzero().tolist() == [[row]]
    assert changed[row].item() == -(1 << 15)
    with pytest.raises(RuntimeError, match="no bit 16 of 0"):
        call(sglang_loader.flip_bit, model, tmp_path, name="self_attn.k_proj.weight", element=0, bit=16)
