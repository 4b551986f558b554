"""SGLang over two ranks: the tokens and log-probabilities of one rank, by contract R2's segments. Two engine starts."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from zerokl import kernels
from zerokl.alignment.megatron.layout import Layout, LayoutError
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.modules import PackedPositions
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.sglang import RolloutEngine
from zerokl.alignment.sglang.config import EngineConfig, check_parallel, inspect_model
from zerokl.alignment.sglang.errors import EngineError, HookError, UnsupportedError
from zerokl.alignment.tensor_parallel import rank_part
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams
from zerokl.alignment.verify import compare
from zerokl.orchestrate import models
from zerokl.orchestrate.scoring import score

RANKS, SEGMENTS = 2, 4
SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.95, "top_k": 50},
]


def config(model, **options) -> EngineConfig:
    sizes = {"context_length": 256, "max_total_tokens": 4096, "chunked_prefill_size": 32}
    return EngineConfig(str(model), **sizes, tensor_parallel=RANKS, **options)


def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            tuple(rng.integers(3, 320, length).tolist()),
            SamplingParams(max_new_tokens=10, seed=index, ignore_eos=True, **SAMPLINGS[index % 5]),
        )
        for index, length in enumerate([1, 2, 90, 17, 32, 40, 9, 63, 5, 30])
    ]


@dataclass
class Outcome:
    """What one engine of two ranks answered."""

    reports: list[dict]
    generations: list[Generation]
    alone: list[Generation]
    digests: dict[str, str]
    flipped: dict[str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One dense layer and two sparse ones, biases, shared experts: every kind of row-parallel product."""
    return models.tiny("glm4_moe", tmp_path_factory.mktemp("model") / "glm4_moe")


@pytest.fixture(scope="module")
def outcome(model) -> Outcome:
    options = {"segments": SEGMENTS, "capture_experts": True}
    with RolloutEngine(config(model, **options), start_timeout_s=400) as engine:
        generations = engine.generate(requests(), timeout_s=120)
        alone = []
        for request in requests():
            engine.flush_cache()
            alone += engine.generate([request], timeout_s=60)
        digests = engine.weights_digest()
        engine.flip_weight_bit("model.layers.1.self_attn.o_proj.weight", 7, 3)
        flipped = engine.weights_digest()
        with pytest.raises(EngineError, match="no parameter 'nonsense'"):
            engine.flip_weight_bit("nonsense", 0, 0)
        return Outcome(engine.manifest()["ranks"], generations, alone, digests, flipped)


@pytest.fixture(scope="module")
def policies(model):
    """segments -> the training policy on one rank."""
    return {
        segments: MegatronPolicy(model, layout=Layout(segments=segments), replay="check")
        for segments in (SEGMENTS, RANKS, 1)
    }


def test_every_hook_is_proven_on_every_rank(outcome):
    assert [report["rank"] for report in outcome.reports] == [0, 1]
    first, second = ({row["hook"]: row for row in report["hooks"]} for report in outcome.reports)
    assert first == second
    # the first layer is dense: output and down projection; two are sparse: output, shared experts, experts
    calls = {"row_linear": 6, "tree_all_reduce": 8, "group_sum": 6, "embedding": 1, "lm_head": 1, "sample": 1}
    assert {name: first[name]["per_forward"] for name in calls} == calls
    assert all(row["calls"] == 2 * row["per_forward"] > 0 and row["intact"] for row in first.values())


def test_log_probabilities_are_those_of_one_rank(outcome, policies):
    found = compare(outcome.generations, score(policies[SEGMENTS], requests(), outcome.generations))
    assert (found.tokens, found.mismatched_tokens, found.nonfinite) == (100, 0, 0)
    assert policies[SEGMENTS].differing_tokens == 0


def test_the_number_of_segments_decides_bits(outcome, policies):
    """The comparison can fail: two segments are one chain a rank, one is none of it."""
    for segments in (RANKS, 1):
        found = compare(outcome.generations, score(policies[segments], requests(), outcome.generations))
        assert found.mismatched_tokens > found.tokens // 4, segments


def test_sampled_tokens_are_those_of_one_rank(outcome, policies):
    """Drawn again from the training forward's hidden states; both log-probabilities too."""
    made, trained = requests(), policies[SEGMENTS].model
    batch = PackedBatch.pack(made, outcome.generations)
    with torch.no_grad():
        hidden = trained.decoder(trained.embed(batch), None, packed_seq_params=PackedPositions.of(batch, None))
    asked = [request.sampling for request in made]
    again = kernels.sample(
        hidden.squeeze(1)[batch.rows],
        head=trained.output_layer.weight.detach(),
        temperature=torch.tensor([asked[i].temperature for i in batch.sequence]),
        top_p=batch.top_p,
        top_k=batch.top_k,
        seed=torch.tensor([asked[i].seed for i in batch.sequence]),
        position=batch.positions[batch.rows] + 1,
    )
    assert again.token.tolist() == batch.targets.tolist()
    for name, values in (("logprobs", again.logprob), ("raw_logprobs", again.raw_logprob)):
        sampled = np.concatenate([getattr(generation, name) for generation in outcome.generations])
        assert sampled.tobytes() == values.numpy().tobytes(), name


def test_alone_equals_batched(outcome):
    for alone, together in zip(outcome.alone, outcome.generations, strict=True):
        assert alone.output_ids == together.output_ids
        assert alone.logprobs.tobytes() == together.logprobs.tobytes()
        assert alone.routed_experts.tobytes() == together.routed_experts.tobytes()


def test_digests_cover_every_rank(outcome, policies):
    policy = policies[SEGMENTS]
    assert outcome.digests == policy.weights_digest(RANKS)
    assert len(outcome.digests) == RANKS * len(policy.weights_digest())
    different = {name for name, digest in outcome.digests.items() if outcome.flipped[name] != digest}
    assert different == {"model.layers.1.self_attn.o_proj.weight@1"}


def test_a_hook_missing_on_the_second_rank_is_refused(tiny_models):
    with pytest.raises(HookError, match="'silu_and_mul' did not take effect on rank 1: 0 calls"):
        RolloutEngine(config(tiny_models["llama"], segments=2, disabled_hooks=("silu_and_mul@1",)), start_timeout_s=400)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3, "segments": 4}, "tensor=3; supported: 1, 2, 4, 8"),
        ({"segments": 6}, "segments=6; supported"),
        ({"tensor": 4, "segments": 2}, "segments=2 must cover tensor=4"),
        ({"tensor": 4, "segments": 4}, "2 key-value heads do not divide over tensor=4"),
        ({"segments": 8}, "intermediate_size 188 does not divide into segments=8 of whole pairs"),
    ],
)
def test_both_engines_refuse_alike(tiny_models, tmp_path, options, message):
    folder = tiny_models["llama"]
    if "188" in message:
        (tmp_path / "config.json").write_text(
            (folder / "config.json").read_text().replace('"intermediate_size": 192', '"intermediate_size": 188')
        )
        (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        folder = tmp_path
    with pytest.raises(LayoutError, match=message):
        Layout(**options).check(ModelConfig.load(folder))
    renamed = {"tensor_parallel" if name == "tensor" else name: size for name, size in options.items()}
    with pytest.raises(UnsupportedError, match=message):
        check_parallel(EngineConfig(str(folder), **renamed), inspect_model(str(folder)))


def test_what_one_rank_alone_can_do(tiny_models):
    with pytest.raises(UnsupportedError, match="trace: needs one rank"):
        EngineConfig("m", trace=True, radix_cache=False, tensor_parallel=2, segments=2)
    with pytest.raises(UnsupportedError, match="stock: SGLang's own kernels know no segments"):
        EngineConfig("m", stock=True, segments=2)
    info = inspect_model(str(tiny_models["llama"]))
    padded = replace(info, widths=replace(info.widths, vocabulary=328))
    with pytest.raises(UnsupportedError, match="a vocabulary of 328 over tensor=2; supported: multiples of 64"):
        check_parallel(EngineConfig("m", tensor_parallel=2, segments=2), padded)


def test_a_rank_holds_rows_columns_or_all():
    whole = torch.arange(24).view(4, 6)
    assert torch.equal(rank_part("model.layers.0.mlp.experts.3.up_proj.weight", whole, 1, 2), whole[2:])
    assert torch.equal(rank_part("model.layers.0.self_attn.o_proj.weight", whole, 1, 2), whole[:, 3:])
    assert torch.equal(rank_part("model.layers.0.self_attn.k_proj.bias", whole[0], 0, 2), whole[0, :3])
    for name in ("model.norm.weight", "model.layers.0.mlp.gate.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert rank_part(name, whole, 1, 2) is whole
