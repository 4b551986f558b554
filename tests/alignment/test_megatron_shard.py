"""The shards of every layout: bitwise round trips, Megatron's rules, and its distributed checkpoint."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_ranks import READ, policy, step
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from zerokl.alignment.architectures import BUILT_IN
from zerokl.alignment.megatron.blocks import blocks
from zerokl.alignment.megatron.convert import hf_dtype, hf_shapes, read_hf_weights
from zerokl.alignment.megatron.convert_moe import separate_experts
from zerokl.alignment.megatron.layout import Layout, LayoutError, Place
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError, MoeConfig
from zerokl.alignment.megatron.shard import join, pieces, shard
from zerokl.alignment.routing import Router
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import read_shape

DENSE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False, "qk_norm": False, "qkv_bias": False, "rotary_dim": 4, "interleaved_rotary": False,
}  # fmt: skip
QWEN_ROUTER = Router(experts=8, top_k=2, first_layer=0, layers=4)
GLM_ROUTER = Router(experts=8, top_k=2, first_layer=1, layers=4, bias=True, shared_experts=2)
VARIANTS = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": {"qk_norm": True, "moe": MoeConfig(QWEN_ROUTER, 16)},
    "Glm4MoeForCausalLM": {"qk_norm": True, "qkv_bias": True, "moe": MoeConfig(GLM_ROUTER, 16)},
}


def layout_of(tensor=1, pipeline=1, virtual_pipeline=1, expert=1):
    return Layout(tensor, pipeline, virtual_pipeline if pipeline > 1 else 1, expert, segments=tensor)


LAYOUTS = st.builds(
    layout_of,
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2]),
    virtual_pipeline=st.sampled_from([1, 2]),
    expert=st.sampled_from([1, 2, 4]),
)


def model(name):
    return ModelConfig(architecture=name, **(DENSE | VARIANTS[name]))


@cache
def weights(name, seed=0):
    """Every bit pattern may occur in a weight, NaN and -0 included: they are moved, not computed with."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for key, shape in hf_shapes(model(name)).items():
        size = hf_dtype(key).itemsize
        octets = torch.randint(256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=random)
        made[key] = octets.view(hf_dtype(key))
    return made


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def fitting(name, layout):
    return layout if model(name).moe else replace(layout, expert=1)


def test_every_architecture_of_the_package_is_covered():
    assert VARIANTS.keys() == BUILT_IN.keys()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(VARIANTS)), LAYOUTS, LAYOUTS, st.integers(0, 2))
def test_layouts_change_no_bit(name, first, second, seed):
    """Hugging Face to the ranks of one layout, to those of another, and back."""
    config, hf = model(name), weights(name, seed)
    first, second = fitting(name, first), fitting(name, second)
    joined = join(config, first, {place: shard(config, hf, first, place) for place in first.every_place()})
    assert_same_bits(joined, hf)
    again = {place: shard(config, joined, second, place) for place in second.every_place()}
    assert_same_bits(join(config, second, again), hf)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(VARIANTS)), LAYOUTS)
def test_blocks_say_where_each_weight_lies(name, layout):
    """What a weight transfer reads by them: of every parameter every byte, from the tensor it belongs to."""
    config, hf, layout = model(name), weights(name), fitting(name, layout)
    for place in layout.every_place():
        local, covered = shard(config, hf, layout, place), {}
        for block in blocks(config, pieces(config, layout, place)):
            tensor, parameter = hf[block.tensor], local[block.parameter]
            matrix = parameter.view(-1, parameter.shape[-1] if parameter.dim() > 1 else 1)
            rows = matrix[block.row : block.row + block.bottom - block.top]
            box = tensor.view(len(tensor), -1)[block.top : block.bottom, block.left : block.right]
            assert torch.equal(rows.contiguous().view(torch.uint8), box.contiguous().view(torch.uint8)), block
            covered[block.parameter] = covered.get(block.parameter, 0) + box.numel()
        assert covered == {name: parameter.numel() for name, parameter in local.items()}


def test_a_rank_holds_its_part_and_no_more():
    config, layout = model("Glm4MoeForCausalLM"), layout_of(tensor=2, pipeline=2, expert=4)
    hf = weights("Glm4MoeForCausalLM")
    first = shard(config, hf, layout, Place(tensor=1, stage=0, expert=3))
    last = shard(config, hf, layout, Place(tensor=1, stage=1, expert=3))
    assert first["embedding.word_embeddings.weight"].shape == (20, 16)
    assert "output_layer.weight" not in first
    assert "decoder.final_layernorm.weight" not in first
    assert last["output_layer.weight"].shape == (20, 16)
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"0", "1"}
    assert last["decoder.layers.0.mlp.experts.linear_fc1.weight"].shape == (2, 32, 16)
    assert torch.equal(
        last["decoder.layers.0.mlp.router.expert_bias"].view(torch.uint8),
        hf["model.layers.2.mlp.gate.e_score_correction_bias"].view(torch.uint8),
    )
    expert = last["decoder.layers.1.mlp.experts.linear_fc2.weight"][1]
    assert torch.equal(expert.view(torch.uint8), hf["model.layers.3.mlp.experts.7.down_proj.weight"].view(torch.uint8))


def test_a_rank_computes_with_whole_heads_and_pairs():
    """Its rows are whole key-value groups, and row i of its gate stands half its rows above row i of its up."""
    config, layout, rank = model("Qwen2ForCausalLM"), layout_of(tensor=4), Place(tensor=2)
    hf = weights("Qwen2ForCausalLM")
    held = shard(config, hf, layout, rank)
    qkv, bias = (held[f"decoder.layers.3.self_attention.linear_qkv.{kind}"] for kind in ("weight", "bias"))
    expected = [hf[f"model.layers.3.self_attn.{name}_proj.weight"].chunk(4)[2] for name in "qkv"]
    assert torch.equal(qkv.view(torch.uint8), torch.cat(expected).view(torch.uint8))
    expected = [hf[f"model.layers.3.self_attn.{name}_proj.bias"].chunk(4)[2] for name in "qkv"]
    assert torch.equal(bias.view(torch.uint8), torch.cat(expected).view(torch.uint8))
    for found, name in (("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")):
        columns = hf[f"model.layers.3.{name}.weight"].chunk(4, 1)[2].contiguous()
        assert torch.equal(held[f"decoder.layers.3.{found}.weight"].view(torch.uint8), columns.view(torch.uint8))
    gate, up = held["decoder.layers.3.mlp.linear_fc1.weight"].chunk(2)
    for found, name in ((gate, "gate"), (up, "up")):
        whole = hf[f"model.layers.3.mlp.{name}_proj.weight"]
        assert torch.equal(found.view(torch.uint8), whole[12:18].view(torch.uint8))


def test_the_last_stage_holds_a_tied_head():
    config, layout = model("Qwen2ForCausalLM"), layout_of(tensor=2, pipeline=2)
    hf = weights("Qwen2ForCausalLM")
    shards = {place: shard(config, hf, layout, place) for place in layout.every_place()}
    last = shards[Place(tensor=1, stage=1)]
    copy = last["output_layer.weight"] = last["output_layer.weight"].clone()  # it was a view
    assert torch.equal(copy.view(torch.uint8), hf["model.embed_tokens.weight"][20:].view(torch.uint8))
    copy.view(torch.int16)[3, 5] += 1
    with pytest.raises(ModelError, match=r"another embedding\.word_embeddings\.weight than one before it"):
        join(config, layout, shards)


def test_experts_may_lie_on_the_tensor_parallel_ranks():
    config, layout = model("Qwen3MoeForCausalLM"), layout_of(tensor=2, expert=2)
    hf = weights("Qwen3MoeForCausalLM")
    ranks = layout.places(0, 2) + layout.places(1, 2)
    shards = {rank: shard(config, hf, layout, rank) for rank in ranks}
    assert_same_bits(join(config, layout, shards), hf)
    del shards[ranks[1]]
    with pytest.raises(ModelError, match="nothing given holds all of decoder"):
        join(config, layout, shards)


def test_missing_and_unexpected_tensors_are_named():
    config, layout = model("LlamaForCausalLM"), Layout()
    held = shard(config, weights("LlamaForCausalLM"), layout, Place())
    held["extra"] = held.pop("decoder.final_layernorm.weight")
    with pytest.raises(ModelError, match=r"decoder\.final_layernorm\.weight, extra"):
        join(config, layout, {Place(): held})


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("LlamaForCausalLM", Layout(tensor=8, segments=8), "intermediate_size 24 does not divide into segments=8"),
        ("LlamaForCausalLM", Layout(pipeline=3), "4 layers do not divide into 3 stages"),
        ("LlamaForCausalLM", Layout(expert=2), "is dense"),
        ("Qwen3MoeForCausalLM", Layout(expert=3), "8 experts do not divide over expert=3"),
    ],
)
def test_layouts_that_do_not_divide_the_model(name, layout, message):
    with pytest.raises(LayoutError, match=message):
        shard(model(name), weights(name), layout, Place())


def test_a_rank_outside_the_layout():
    with pytest.raises(ValueError, match="is outside"):
        shard(model("LlamaForCausalLM"), weights("LlamaForCausalLM"), layout_of(tensor=2), Place(tensor=2))


def test_names_and_shapes_are_those_of_the_model_that_megatron_builds(tiny_models):
    """One rank's shard is what the policy of one rank holds."""
    from zerokl.alignment.megatron.policy import MegatronPolicy

    for name in ("qwen2", "glm4-moe"):
        policy = MegatronPolicy(tiny_models[name])
        config = policy.config
        held = shard(config, read_hf_weights(tiny_models[name], config), Layout(), Place())
        built = policy.model.state_dict()
        assert {k: tuple(t.shape) for k, t in held.items()} == {
            k: tuple(t.shape) for k, t in built.items() if isinstance(t, torch.Tensor)
        }


@pytest.fixture(scope="module")
def two_ranks(tiny_models, tmp_path_factory):
    """The folder in which two ranks did what `checkpoint_ranks` says, after one rank trained and saved twice."""
    model, folder = tiny_models["glm4-moe"], tmp_path_factory.mktemp("ranks")
    alone = policy(model)
    for number in (1, 2):
        step(alone, number)
        alone.save(folder / f"one-{number}")
    (folder / "checkpoint").mkdir()
    script = str(Path(__file__).with_name("checkpoint_ranks.py"))
    command = [sys.executable, "-P", script, str(model), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_a_distributed_checkpoint_is_read_in_other_layouts(tiny_models, two_ranks):
    config = ModelConfig.load(tiny_models["glm4-moe"])
    hf = read_hf_weights(tiny_models["glm4-moe"], config)
    for name, (layout, places) in READ.items():
        for r, place in enumerate(places):
            assert_same_bits(load_file(two_ranks / f"{name}-{r}.safetensors"), shard(config, hf, layout, place))
    assert "holds the weights of another model" in (two_ranks / "error-1").read_text()


def test_a_run_resumes_in_another_layout_bit_for_bit(two_ranks):
    """One rank, then tensor and expert parallel, then pipeline stages: weights and optimizer as if never moved."""
    for first, second in (("one-1", "tensor-1"), ("one-2", "pipeline-2")):
        for file in ("model.safetensors", "optimizer.safetensors", "checkpoint.json"):
            assert (two_ranks / first / file).read_bytes() == (two_ranks / second / file).read_bytes(), (second, file)
    assert "already exists" in (two_ranks / "exists-0").read_text()
    assert "already exists" in (two_ranks / "exists-1").read_text()


def test_a_layer_that_forgets_its_records_fails_the_step_on_every_rank(two_ranks):
    assert "layer 1 took its routing records 0 times, 1 expected" in (two_ranks / "forgot-1").read_text()
    assert "another rank's layers" in (two_ranks / "forgot-0").read_text()


def test_ranks_export_and_digest_the_whole_model(tiny_models, two_ranks):
    alone = policy(tiny_models["glm4-moe"])
    alone.load(two_ranks / "one-1")
    digests = alone.weights_digest()
    assert [json.loads((two_ranks / f"digests-{rank}.json").read_text()) for rank in range(2)] == [digests] * 2
    config = ModelConfig.load(two_ranks / "exported")
    assert_same_bits(read_hf_weights(two_ranks / "exported", config), dict(alone.named_weights()))


@pytest.mark.parametrize(
    "sizes",
    [
        MegatronSizes(),
        MegatronSizes(tp=2),
        MegatronSizes(pp=2, dp=2),
        MegatronSizes(tp=2, pp=2, dp=2),
        MegatronSizes(tp=2, ep=2),
        MegatronSizes(dp=4, ep=4),
        MegatronSizes(tp=2, pp=2, dp=2, ep=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied", "qwen3", "qwen3-moe", "glm4-moe"])
def test_ranks_hold_the_bytes_that_the_planner_of_transfers_expects(tiny_models, name, sizes):
    config = ModelConfig.load(tiny_models[name])
    planned = read_shape(tiny_models[name])
    sizes = sizes if config.moe else replace(sizes, ep=1)
    layout = Layout(sizes.tp, sizes.pp, expert=sizes.ep, segments=sizes.tp)
    hf = read_hf_weights(tiny_models[name], config)
    ranks = megatron_layout(planned, sizes).ranks
    for number, rank in enumerate(ranks):
        (place,) = layout.places(number, len(ranks))
        held = separate_experts(shard(config, hf, layout, place))
        assert held.keys() == rank.buffers.keys()
        for buffer, tensor in held.items():
            expected = np.zeros(rank.buffers[buffer], np.uint8)
            for piece in (piece for piece in rank.pieces if piece.buffer == buffer):
                box, source = piece.box, hf[piece.tensor]
                rows = source.reshape(len(source), -1)[box.top : box.bottom, box.left : box.right].contiguous()
                octets = rows.view(torch.uint8).numpy()
                for row, values in enumerate(octets):
                    at = piece.offset + row * piece.pitch
                    expected[at : at + len(values)] = values
            assert np.array_equal(expected, tensor.contiguous().flatten().view(torch.uint8).numpy()), (number, buffer)


def test_places_follow_megatrons_order():
    """Tensor fastest, then context, then data; experts among all of these; pipeline slowest."""
    layout = Layout(tensor=2, context=2, pipeline=2, virtual_pipeline=2, expert=4, segments=2)
    assert layout.places(0, 16) == [Place(0, 0, 0), Place(0, 2, 0)]
    assert layout.places(7, 16) == [Place(1, 0, 3), Place(1, 2, 3)]
    assert layout.places(14, 16) == [Place(0, 1, 2), Place(0, 3, 2)]
    with pytest.raises(LayoutError, match=r"12 ranks do not divide into"):
        layout.places(0, 12)
