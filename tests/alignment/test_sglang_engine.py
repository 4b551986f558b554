"""The rollout engine on tiny random models: one SGLang engine per model, shared by the tests of this file."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from zerokl import kernels, weightsync
from zerokl.alignment.sglang import RolloutEngine
from zerokl.alignment.sglang.config import EngineConfig
from zerokl.alignment.sglang.errors import EngineError, HookError
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams, WeightSpan
from zerokl.orchestrate.damage import DamagingSource
from zerokl.orchestrate.weights import Meeting, WeightLink
from zerokl.weightsync.errors import WeightSyncError

CHUNK = 32
VOCAB = 320


def config(model: Path, **options) -> EngineConfig:
    defaults = {"threads": 1, "context_length": 256, "max_total_tokens": 4096, "chunked_prefill_size": CHUNK}
    return EngineConfig(str(model), **(defaults | options))


class Sender:
    """The trainer's side: sends the engine's own weights, scaled."""

    def __init__(self, meeting: Meeting, tensors: dict[str, torch.Tensor]) -> None:
        self.meeting, self.tensors = meeting, tensors
        self.source = DamagingSource(meeting.folder)

    def link(self, *, scale=1.0, tensors=None):
        scaled = {name: tensor * scale for name, tensor in (tensors or self.tensors).items()}
        return WeightLink(self.meeting, *weightsync.named_layout(scaled), source=self.source)

    def send(self, version, **options):
        with self.link(**options) as link:
            return link.sync(version, timeout_s=30)


@pytest.fixture(scope="module", params=["llama", "qwen3-tied"])
def both(request, tiny_models, tmp_path_factory):
    """An engine, and what sends it weights; it has its checkpoint's own to begin with."""
    meeting = Meeting.in_folder(tmp_path_factory.mktemp("m"))
    # the second engine has larger pages and too little cache for a batch: neither may change a bit
    options = {"llama": {}, "qwen3-tied": {"page_size": 4, "max_total_tokens": 320}}[request.param]
    model = tiny_models[request.param]
    sender = Sender(meeting, load_file(model / "model.safetensors"))
    with RolloutEngine(config(model, transfer=meeting.transfer(), **options), start_timeout_s=600) as started:
        sender.send("first")
        yield started, sender


@pytest.fixture
def engine(both):
    return both[0]


@pytest.fixture
def trainer(both):
    return both[1]


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCAB, length).tolist())


def mixed_requests() -> list[Request]:
    """Short and long prompts (longer than a prefill chunk), every kind of sampling, arrivals while others decode."""
    samplings = [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 0.9, "top_p": 0.95, "top_k": 50},
    ]
    lengths = [1, 2, 3 * CHUNK + 5, 17, CHUNK, 40, 9, 2 * CHUNK - 1, 5, 30]
    return [
        Request(
            prompt(length, index),
            SamplingParams(
                max_new_tokens=4 + index % 5 * 3, seed=1000 + index, ignore_eos=True, **samplings[index % 5]
            ),
            arrival_s=0.03 * (index % 4),
        )
        for index, length in enumerate(lengths)
    ]


def alone(engine: RolloutEngine, requests: list[Request]) -> list[Generation]:
    """Each request by itself, on an empty cache."""
    results = []
    for request in requests:
        engine.flush_cache()
        results += engine.generate([request], timeout_s=60)
    return results


def assert_same(left: list[Generation], right: list[Generation]) -> None:
    assert len(left) == len(right)
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.output_ids == b.output_ids, index
        assert a.logprobs.tobytes() == b.logprobs.tobytes(), index
        assert a.raw_logprobs.tobytes() == b.raw_logprobs.tobytes(), index


def reference_hidden(model: Path, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of a packed batch and the head's weight, by zerokl.kernels alone."""
    import json

    cfg, w = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    heads, kv_heads, dim = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    eps, rope = cfg["rms_norm_eps"], cfg["rope_parameters"]["rope_theta"]
    table = kernels.rotary_table(cfg["max_position_embeddings"], dim, rope)
    x, residual = kernels.embedding(batch.tokens, w["model.embed_tokens.weight"]), None
    for layer in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        norm = w[p + "input_layernorm.weight"]
        if residual is None:
            h, residual = kernels.rms_norm(x, norm, eps), x
        else:
            h, residual = kernels.rms_norm(x, norm, eps, residual=residual)
        q, k, v = (kernels.linear(h, w[f"{p}self_attn.{n}_proj.weight"]).unflatten(-1, (-1, dim)) for n in "qkv")
        if p + "self_attn.q_norm.weight" in w:
            q = kernels.rms_norm(q, w[p + "self_attn.q_norm.weight"], eps)
            k = kernels.rms_norm(k, w[p + "self_attn.k_norm.weight"], eps)
        q, k = kernels.rotary(q, k, batch.positions, table)
        assert (q.shape[1], k.shape[1]) == (heads, kv_heads)
        x = kernels.attention_varlen(q, k, v, batch.cu_seqlens, scale=dim**-0.5)
        x = kernels.linear(x.flatten(1), w[p + "self_attn.o_proj.weight"])
        h, residual = kernels.rms_norm(x, w[p + "post_attention_layernorm.weight"], eps, residual=residual)
        gate_up = torch.cat([w[f"{p}mlp.gate_proj.weight"], w[f"{p}mlp.up_proj.weight"]])
        x = kernels.linear(kernels.silu_and_mul(kernels.linear(h, gate_up)), w[p + "mlp.down_proj.weight"])
    h, _ = kernels.rms_norm(x, w["model.norm.weight"], eps, residual=residual)
    return h, w.get("lm_head.weight", w["model.embed_tokens.weight"])


def test_every_hook_is_proven(engine):
    hooks = {row["hook"]: row for row in engine.manifest()["hooks"]["hooks"]}
    assert set(hooks) == {
        "embedding", "linear", "row_linear", "rms_norm", "add_rms_norm", "rotary", "silu_and_mul", "lm_head",
        "attention", "sample",
    }  # fmt: skip
    assert all(row["calls"] == 2 * row["per_forward"] > 0 and row["intact"] for row in hooks.values())


def test_alone_equals_batched(engine):
    requests = mixed_requests()
    engine.flush_cache()
    assert_same(engine.generate(requests, timeout_s=60), alone(engine, requests))


def test_a_cached_prefix_changes_no_bit(engine):
    """Different hits also cut the rest of the prompt into different chunks."""
    sampling = SamplingParams(max_new_tokens=6, seed=5, ignore_eos=True)
    long = Request(prompt(3 * CHUNK + 20, 77), sampling)
    cold = alone(engine, [long])
    for cached in (8, CHUNK + 3, 3 * CHUNK + 20):
        engine.flush_cache()
        engine.generate([Request(long.input_ids[:cached], SamplingParams(max_new_tokens=1))], timeout_s=60)
        hit = engine.generate([long], timeout_s=60)
        assert hit[0].cached_tokens > 0
        assert_same(hit, cold)


def test_decode_equals_a_packed_forward_pass(engine):
    """Every sampled token's two log-probabilities, against the training form of the same kernels."""
    requests = mixed_requests()
    generations = engine.generate(requests, timeout_s=60)
    batch = PackedBatch.pack(requests, generations)
    hidden, head = reference_hidden(Path(engine.config.model_path), batch)
    options = {"temperature": batch.temperature, "top_p": batch.top_p, "top_k": batch.top_k}
    scored = kernels.selected_logprob(hidden[batch.rows], head, batch.targets, **options).logprob
    raw = kernels.selected_logprob(hidden[batch.rows], head, batch.targets, temperature=1.0, top_p=1.0, top_k=0).logprob
    assert np.concatenate([g.logprobs for g in generations]).tobytes() == scored.numpy().tobytes()
    assert np.concatenate([g.raw_logprobs for g in generations]).tobytes() == raw.numpy().tobytes()


def test_the_seed_decides_the_tokens(engine):
    request = Request(prompt(10, 3), SamplingParams(max_new_tokens=24, seed=1, ignore_eos=True))
    other = Request(request.input_ids, SamplingParams(max_new_tokens=24, seed=2, ignore_eos=True))
    first, again, different = engine.generate([request, request, other], timeout_s=60)
    assert first.output_ids == again.output_ids != different.output_ids


def test_stop_tokens_and_length(engine):
    request = Request(prompt(10, 4), SamplingParams(max_new_tokens=16, seed=9, ignore_eos=True))
    (full,) = engine.generate([request], timeout_s=60)
    assert (full.finish_reason, len(full.output_ids), len(full.logprobs)) == ("length", 16, 16)
    stop = next(token for token in full.output_ids[3:] if token not in full.output_ids[:3])
    sampling = SamplingParams(max_new_tokens=16, seed=9, stop_token_ids=(stop,))
    (stopped,) = engine.generate([Request(request.input_ids, sampling)], timeout_s=60)
    assert stopped.finish_reason == "stop"
    assert stopped.output_ids == full.output_ids[: full.output_ids.index(stop) + 1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request((), SamplingParams()), "request 1 has an empty prompt"),
        (Request(prompt(250, 0), SamplingParams(max_new_tokens=7)), "prompt of 250 tokens plus max_new_tokens 7"),
        (Request((VOCAB,), SamplingParams()), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        (Request((5,), SamplingParams(top_p=0.0)), "top_p must be in"),
        (Request((5,), SamplingParams(top_k=1)), "greedy is temperature 0"),
        (Request((5,), SamplingParams(temperature=float("nan"))), "temperature must be"),
        (Request((5,), SamplingParams(max_new_tokens=0)), "max_new_tokens must be at least 1"),
    ],
)
def test_bad_requests_name_themselves(engine, bad, message):
    good = Request((5,), SamplingParams(max_new_tokens=1))
    with pytest.raises(ValueError, match=message):
        engine.generate([good, bad], timeout_s=60)


def test_the_longest_request_fits(engine):
    """Prompt and response may fill the context to the last token."""
    request = Request(prompt(200, 8), SamplingParams(max_new_tokens=56, ignore_eos=True))
    (generation,) = engine.generate([request], timeout_s=60)
    assert len(generation.output_ids) == 56


def weights(engine: RolloutEngine) -> dict[str, torch.Tensor]:
    return load_file(Path(engine.config.model_path) / "model.safetensors")


def test_the_digest_is_that_of_the_checkpoint(engine):
    expected = {name: weightsync.tensor_digest(tensor) for name, tensor in weights(engine).items()}
    assert engine.weights_digest() == expected


def test_sent_weights_are_the_ones_sampled_from(engine, trainer):
    original = weights(engine)
    request = Request(prompt(20, 6), SamplingParams(max_new_tokens=8, ignore_eos=True))
    (before,) = engine.generate([request], timeout_s=60)
    report = trainer.send("step-1", scale=1.25)
    assert report.bytes == sum(tensor.nbytes for tensor in original.values()) == report.copied_bytes
    assert report.copied_by_engines == 0
    assert engine.weights_digest() == {n: weightsync.tensor_digest(t * 1.25) for n, t in original.items()}
    assert engine.serving() == "step-1"
    (after,) = engine.generate([request], timeout_s=60)
    assert after.weight_spans == (WeightSpan("step-1", 0, 8),)
    assert after.cached_tokens == 0  # the old weights' cache is gone
    assert after.raw_logprobs[0] != before.raw_logprobs[0]
    trainer.send("step-2")
    (restored,) = engine.generate([request], timeout_s=60)
    assert_same([restored], [before])


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("flipped bit", "have digest"),
        ("missing chunk", "have digest"),
        ("source error", "cannot read its weights"),
        ("full memory", "cannot export .* File too large"),
    ],
)
def test_damaged_weights_are_refused_and_the_old_ones_serve_on(engine, trainer, damage, cause):
    request = Request(prompt(20, 6), SamplingParams(max_new_tokens=8, ignore_eos=True))
    version, before = engine.serving(), engine.weights_digest()
    (expected,) = engine.generate([request], timeout_s=60)
    trainer.source.plan(damage, where=7)
    with pytest.raises(WeightSyncError, match=cause):
        trainer.send("bad", scale=2.0)
    assert trainer.source.witness
    assert engine.weights_digest() == before  # all or nothing
    assert engine.serving() == version
    (generation,) = engine.generate([request], timeout_s=60)
    assert generation.weight_version == version
    assert_same([generation], [expected])


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "dtype"])
def test_weights_that_do_not_match_are_refused(engine, trainer, fault):
    before, sent = engine.weights_digest(), weights(engine)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = sent.pop(name)
    if fault == "unknown":
        sent |= {name: tensor, "model.extra.weight": tensor}
    elif fault == "shape":
        sent[name] = tensor.T
    elif fault == "dtype":
        sent[name] = tensor.float()
    with pytest.raises(WeightSyncError, match="extra" if fault == "unknown" else "up_proj"):
        trainer.send("bad", tensors=sent)
    assert engine.weights_digest() == before


LONG = [Request(prompt(30, 90 + i), SamplingParams(max_new_tokens=200, seed=i, ignore_eos=True)) for i in range(2)]


def caught(engine: RolloutEngine, trainer: Sender, policy: str) -> list[Generation]:
    """Send other weights while requests are under way, as often as it takes to meet one between two of its tokens."""
    delay_s = 0.2
    for _ in range(12):
        trainer.send("old")
        with trainer.link(scale=1.25) as link, ThreadPoolExecutor(1) as pool:
            link.sender.wait(30)
            running = pool.submit(engine.generate, LONG, timeout_s=60)
            time.sleep(delay_s)
            link.sync("new", timeout_s=30, in_flight=policy)
            found = running.result(timeout=60)
        if any(g.weight_spans[0].version == "old" and g.weight_spans[0].end < 200 for g in found):
            return found
        delay_s = delay_s * 1.5 if found[0].weight_versions == {"new"} else delay_s / 2
    raise AssertionError("the weights always came before or after the tokens")


@pytest.mark.parametrize("policy", ["abort", "retract", "continue"])
def test_requests_under_way_when_new_weights_come(engine, trainer, policy):
    """One engine, one policy a transfer; every token knows the weights that sampled it."""
    if engine.config.max_total_tokens < 2 * 230:
        return  # the other engine's cache holds no two of these requests
    trainer.send("old")
    expected = alone(engine, LONG)
    found = caught(engine, trainer, policy)
    met = [i for i, g in enumerate(found) if g.weight_spans[0].version == "old" and g.weight_spans[0].end < 200]
    for generation, old in ((found[i], expected[i]) for i in met):
        first = generation.weight_spans[0]
        assert first.start == 0
        assert generation.output_ids[: first.end] == old.output_ids[: first.end]
        assert generation.logprobs[: first.end].tobytes() == old.logprobs[: first.end].tobytes()
        if policy == "abort":
            assert (generation.finish_reason, len(generation.output_ids)) == ("abort", first.end)
        else:
            assert (generation.finish_reason, len(generation.output_ids)) == ("length", 200)
            assert generation.weight_spans[1:] == (WeightSpan("new", first.end, 200),)
            assert generation.logprobs[first.end] != old.logprobs[first.end]
    if policy == "retract":  # the rest is what the new weights give for the prompt and the first part
        for request, generation in ((LONG[i], found[i]) for i in met):
            end = generation.weight_spans[0].end
            rest = replace(request.sampling, max_new_tokens=200 - end)
            (again,) = alone(engine, [Request((*request.input_ids, *generation.output_ids[:end]), rest)])
            assert again.output_ids == generation.output_ids[end:]
            assert again.logprobs.tobytes() == generation.logprobs[end:].tobytes()
    # whatever the cache still holds of the old weights, no later request finds it
    fresh = replace(LONG[0], sampling=SamplingParams(max_new_tokens=4))
    (cached,) = engine.generate([fresh], timeout_s=60)
    assert cached.weight_versions == {"new"}
    assert_same([cached], alone(engine, [fresh]))


def test_no_weights_no_tokens(tiny_models, tmp_path):
    """An engine that waits for weights samples nothing before they come."""
    meeting = Meeting.in_folder(tmp_path)
    with RolloutEngine(config(tiny_models["llama"], transfer=meeting.transfer()), start_timeout_s=600) as engine:
        with pytest.raises(EngineError, match="holds no complete version of the weights"):
            engine.generate([Request((5, 6), SamplingParams(max_new_tokens=1))], timeout_s=60)
        assert engine.serving() is None


def test_a_flipped_weight_bit_shows(engine):
    name = "model.layers.0.self_attn.k_proj.weight"
    before = engine.weights_digest()
    engine.flip_weight_bit(name, 7, 3)
    after = engine.weights_digest()
    assert {key for key in before if before[key] != after[key]} == {name}
    engine.flip_weight_bit(name, 7, 3)
    assert engine.weights_digest() == before
    with pytest.raises(EngineError, match="no parameter 'nonsense'"):
        engine.flip_weight_bit("nonsense", 0, 0)


def test_a_disabled_hook_is_refused(tiny_models):
    with pytest.raises(HookError, match="'silu_and_mul' did not take effect: 0 calls"):
        RolloutEngine(config(tiny_models["llama"], disabled_hooks=("silu_and_mul",)))


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != "zombie"]


def test_a_dead_scheduler_is_an_error_with_the_log(tiny_models):
    with RolloutEngine(config(tiny_models["llama"])) as engine:
        children = psutil.Process(engine._process.pid).children(recursive=True)
        (scheduler,) = [child for child in children if "scheduler" in child.cmdline()[0]]
        scheduler.kill()
        start = time.monotonic()
        endless = [Request((5,), SamplingParams(max_new_tokens=255, ignore_eos=True))] * 200
        with pytest.raises(EngineError, match="the engine died"):
            engine.generate(endless, timeout_s=60)
        assert time.monotonic() - start < 30
        with pytest.raises(EngineError, match="cannot wait for"):
            engine.flush_cache()
        assert_gone(children)


OWNER = """
import sys, time
from zerokl.alignment.sglang import RolloutEngine
from zerokl.alignment.sglang.config import EngineConfig
if __name__ == "__main__":
    engine = RolloutEngine(EngineConfig(sys.argv[1], threads=1, context_length=256, max_total_tokens=4096))
    print(engine._process.pid, flush=True)
    time.sleep(600)
"""


def test_the_engine_ends_with_its_owner(tiny_models, tmp_path):
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, "-P", str(script), str(tiny_models["llama"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        os.kill(owner.pid, signal.SIGKILL)
    assert_gone(processes)
