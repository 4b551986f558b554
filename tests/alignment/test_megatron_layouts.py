"""Megatron over ranks: every layout gives the log-probabilities of one rank, bit for bit."""

import json

import pytest
import torch

from zerokl.alignment.megatron.layout import Layout, LayoutError
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.bench import layout_ranks, layouts

LENGTHS = [(5, 7), (1, 3), (40, 20)]


@pytest.fixture(scope="module")
def rows():
    """Over NCCL where every rank can have a GPU, else over gloo."""
    device = "cuda" if torch.cuda.device_count() >= layouts.RANKS else "cpu"
    return {(row["model"], row["layout"]): row for row in layouts.run(device, 600)}


def test_every_layout_has_the_bits_of_one_rank(rows):
    assert len(rows) >= 75
    assert [name for name, row in rows.items() if not layouts.as_it_should(row)] == []
    for (_, layout), row in rows.items():
        assert row["tokens"] == 4 * 244 // (1 if "DP" not in layout else 2 if "TP" in layout else 4), layout


# where the gradients' order of addition is not one rank's: tied weights add two gradients a micro-batch, an expert's
# tokens are not cut between pairs, and ranks share tokens (DP, EP, CP, sequence parallel, TP of sparse layers) or the
# heads of q/k norms (TP)
CUT = {
    *((model, "micro-batches of 8") for model in ("qwen3", "qwen3_moe", "glm4_moe")),
    ("glm4_moe", "micro-batches of 1"),
    *(("qwen3", layout) for layout in ("PP 2", "PP 2, virtual 2")),
}
SHARED = ("DP", "EP", "CP", "sequence parallel")
BOUND = 3e-6  # relative, in the norm of a weight's gradient; docs/architecture.md states it


def test_gradients_are_equal_or_within_their_bound(rows):
    for (model, layout), row in rows.items():
        if row["control"]:
            assert row["gradient"] > 0
        elif (model, layout) in CUT or any(word in layout for word in SHARED) or (model != "llama" and "TP" in layout):
            assert row["gradient"] < BOUND, (model, layout)
        else:
            assert row["gradient"] == 0, (model, layout)


def test_the_gradients_norm_counts_every_weight_once(rows):
    for name, row in rows.items():
        assert row["control"] or row["norm"] < 1e-6, name


def test_replayed_experts_reach_their_tokens_on_every_rank(rows):
    """They are drawn: almost no token would have gone there by itself, and each counts once, padding never."""
    for (model, layout), row in rows.items():
        expected = rows[model, "one rank, replayed"]["differing_tokens"] if "replayed" in layout else 0
        assert row["differing_tokens"] == expected, (model, layout)
    fed = sum(prompt + answer - 1 for prompt, answer in layout_ranks.LENGTHS)
    for model in layout_ranks.SPARSE:
        assert rows[model, "one rank, replayed"]["differing_tokens"] > 0.9 * fed


def test_the_table_names_every_row(rows):
    lines = layouts.table(list(rows.values()))
    assert len(lines) == len(rows) + 1
    assert "TP 4, sequence parallel" in "\n".join(lines)
    engines = {"model": "llama", "layout": "SGLang TP 2, segments 2", "tokens": 384, "mismatched_tokens": 0}
    (line,) = layouts.table([engines | {"gradient": None}])[1:]  # a comparison of two engines has no gradient
    assert line.split() == ["llama", "SGLang", "TP", "2,", "segments", "2", "384", "0"]


def test_the_comparison_can_fail(rows):
    """Another number of segments is another order of addition: other bits of the same numbers."""
    control = [row for row in rows.values() if row["control"]]
    assert len(control) == 4
    for row in control:
        assert row["mismatched_tokens"] > row["tokens"] // 20
        assert not layouts.as_it_should(row | {"mismatched_tokens": 0})
        assert not layouts.as_it_should(row | {"control": False})


def test_padding_changes_no_bit(tiny_models, make_pairs, pack):
    batch = pack(make_pairs(LENGTHS))
    padded = batch.padded(64)
    assert len(padded.tokens) % 64 == 0
    assert padded.cu_seqlens[-1] == len(padded.tokens)
    assert padded.padded(64) is padded
    policy = MegatronPolicy(tiny_models["qwen3"])
    assert torch.equal(policy.logprobs(batch).view(torch.int32), policy.logprobs(padded).view(torch.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor": 3}, "tensor=3; supported: 1, 2, 4, 8"),
        ({"segments": 6}, "segments=6; supported"),
        ({"tensor": 4, "segments": 2}, "segments=2 must cover tensor=4"),
        ({"sequence_parallel": True}, "sequence_parallel needs tensor above 1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline needs pipeline stages"),
        ({"pipeline": 0}, "pipeline=0 must be positive"),
    ],
)
def test_impossible_layouts(options, message):
    with pytest.raises(LayoutError, match=message):
        Layout(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"tensor": 4, "segments": 4}, "2 key-value heads do not divide over tensor=4"),
        ("llama", {"tensor": 2, "segments": 2, "context": 2}, "do not divide over tensor=2 times context=2"),
        ("llama", {"pipeline": 4}, "2 layers do not divide into 4 stages"),
        ("llama", {"expert": 2}, "expert=2, but LlamaForCausalLM is dense"),
        ("qwen3-moe", {"expert": 3}, "8 experts do not divide over expert=3"),
        ("qwen3-moe", {"segments": 8, "tensor": 8}, "key-value heads do not divide over tensor=8"),
        ("glm4-moe", {"tensor": 2, "segments": 2, "context": 2}, "do not divide over tensor=2 times context=2"),
    ],
)
def test_models_that_do_not_divide(tiny_models, name, options, message):
    with pytest.raises(LayoutError, match=message):
        Layout(**options).check(ModelConfig.load(tiny_models[name]))


def test_what_needs_more_ranks_or_the_whole_model(tiny_models):
    with pytest.raises(LayoutError, match=r"1 ranks do not divide into .*tensor=2"):
        MegatronPolicy(tiny_models["llama"], layout=Layout(tensor=2, segments=2))
    policy = MegatronPolicy(tiny_models["llama"], optimizer=OptimizerSettings())
    policy.layout = Layout(tensor=2, segments=2)
    with pytest.raises(LayoutError, match="needs the whole model on one rank"):
        _ = policy.model


def test_the_manifest_names_the_layout(tiny_models):
    manifest = json.loads(json.dumps(MegatronPolicy(tiny_models["llama"], layout=Layout(segments=2)).manifest()))
    assert manifest["layout"]["segments"] == 2
