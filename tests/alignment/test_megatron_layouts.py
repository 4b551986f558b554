"""Megatron over ranks: every layout gives the log-probabilities of one rank, bit for bit."""

import json

import pytest
import torch

from zerokl.alignment.megatron.layout import Layout, LayoutError
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.bench import layouts

LENGTHS = [(5, 7), (1, 3), (40, 20)]


@pytest.fixture(scope="module")
def rows():
    """Over NCCL where every rank can have a GPU, else over gloo."""
    device = "cuda" if torch.cuda.device_count() >= layouts.RANKS else "cpu"
    return {(row["model"], row["layout"]): row for row in layouts.run(device, 600)}


def test_every_layout_has_the_bits_of_one_rank(rows):
    assert len(rows) >= 38
    assert {name: row["mismatched_tokens"] for name, row in rows.items()} == dict.fromkeys(rows, 0)
    for (_, layout), row in rows.items():
        assert row["tokens"] == 4 * 94 // (1 if "DP" not in layout else 2 if "TP" in layout else 4), layout


# how the gradients' order of addition differs from one rank's, and by how much (relative, in a weight's norm)
EQUAL = ["recompute", "padded to 64", "micro-batches of 1", "micro-batches of 8", "PP"]
# tied weights add two gradients a micro-batch, an expert's tokens are not cut between pairs
CUT = {("qwen3_moe", "micro-batches of 8"), *(("qwen3", x) for x in ("micro-batches of 8", "PP 2", "PP 2, virtual 2"))}
SUMS_OF_WEIGHT_GRADIENTS = 3e-6  # fp32 chains over tokens are cut between ranks (DP, EP, CP),
ROUNDED_PARTS = 3e-2  # TP: parts of activations' gradients are rounded to bf16 before they are added


def test_gradients_are_equal_or_within_their_bound(rows):
    for (model, layout), row in rows.items():
        if "TP" in layout:
            assert row["gradient"] < ROUNDED_PARTS, (model, layout)
        elif (model, layout) in CUT or any(word in layout for word in ("DP", "EP", "CP")):
            assert row["gradient"] < SUMS_OF_WEIGHT_GRADIENTS, (model, layout)
        else:
            assert any(word in layout for word in [*EQUAL, "one rank"])
            assert row["gradient"] == 0, (model, layout)


def test_the_table_names_every_row(rows):
    lines = layouts.table(list(rows.values()))
    assert len(lines) == len(rows) + 1
    assert "TP 4, sequence parallel" in "\n".join(lines)


def test_the_comparison_can_fail(tiny_models, make_pairs, pack):
    """Another number of segments is another order of addition."""
    batch = pack(make_pairs(LENGTHS))
    one = MegatronPolicy(tiny_models["qwen3"]).logprobs(batch)
    four = MegatronPolicy(tiny_models["qwen3"], layout=Layout(segments=4)).logprobs(batch)
    assert not torch.equal(one, four)
    assert (one - four).abs().max() < 0.1


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
        (
            "qwen3-moe",
            {"tensor": 2, "segments": 2},
            "Qwen3MoeForCausalLM in tensor=2, pipeline=1, context=1; supported",
        ),
    ],
)
def test_models_that_do_not_divide(tiny_models, name, options, message):
    with pytest.raises(LayoutError, match=message):
        Layout(**options).check(ModelConfig.load(tiny_models[name]))


def test_what_needs_more_ranks_or_the_whole_model(tiny_models, tmp_path):
    with pytest.raises(RuntimeError, match=r"1 ranks do not divide into .*tensor=2"):
        MegatronPolicy(tiny_models["llama"], layout=Layout(tensor=2, segments=2))
    policy = MegatronPolicy(tiny_models["llama"], optimizer=OptimizerSettings())
    policy.layout = Layout(tensor=2, segments=2)
    for use in (policy.weights_digest, lambda: policy.export_hf(tmp_path / "a"), lambda: policy.save(tmp_path / "b")):
        with pytest.raises(LayoutError, match="needs the whole model on one rank"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_names_the_layout(tiny_models):
    manifest = json.loads(json.dumps(MegatronPolicy(tiny_models["llama"], layout=Layout(segments=2)).manifest()))
    assert manifest["layout"]["segments"] == 2
