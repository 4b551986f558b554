"""The shards of every layout: bitwise round trips, Megatron's rules, and its distributed checkpoint."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import READ
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from zerokl.alignment.architectures import BUILT_IN
from zerokl.alignment.megatron.convert import hf_dtype, hf_shapes, hf_to_megatron, read_hf_weights
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError, MoeConfig
from zerokl.alignment.megatron.shard import Layout, Rank, assemble, cut, join, shard
from zerokl.alignment.routing import Router

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
    "Qwen3MoeForCausalLM": {"qk_norm": True, "moe": MoeConfig(QWEN_ROUTER, 12)},
    "Glm4MoeForCausalLM": {"qk_norm": True, "qkv_bias": True, "moe": MoeConfig(GLM_ROUTER, 12)},
}
LAYOUTS = st.builds(
    Layout, tensor=st.sampled_from([1, 2, 4]), pipeline=st.sampled_from([1, 2]), expert=st.sampled_from([1, 2, 4])
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
    return layout if model(name).moe else Layout(layout.tensor, layout.pipeline)


def test_every_architecture_of_the_package_is_covered():
    assert VARIANTS.keys() == BUILT_IN.keys()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(VARIANTS)), LAYOUTS, LAYOUTS, st.integers(0, 2))
def test_layouts_change_no_bit(name, first, second, seed):
    """Hugging Face to the ranks of one layout, to those of another, and back."""
    config, hf = model(name), weights(name, seed)
    first, second = fitting(name, first), fitting(name, second)
    shards = {rank: shard(config, hf, first, rank) for rank in first.ranks()}
    whole = assemble(config, first, shards)
    again = {rank: cut(config, whole, second, rank) for rank in second.ranks()}
    assert_same_bits(join(config, second, again), hf)


def test_a_rank_holds_its_part_and_no_more():
    config, layout = model("Glm4MoeForCausalLM"), Layout(tensor=2, pipeline=2, expert=4)
    hf = weights("Glm4MoeForCausalLM")
    first = shard(config, hf, layout, Rank(tensor=1, pipeline=0, expert=3))
    last = shard(config, hf, layout, Rank(tensor=1, pipeline=1, expert=3))
    assert first["embedding.word_embeddings.weight"].shape == (20, 16)
    assert "output_layer.weight" not in first
    assert "decoder.final_layernorm.weight" not in first
    assert last["output_layer.weight"].shape == (20, 16)
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"0", "1"}
    assert last["decoder.layers.0.mlp.experts.linear_fc1.weight"].shape == (2, 24, 16)
    assert torch.equal(
        last["decoder.layers.0.mlp.router.expert_bias"].view(torch.uint8),
        hf["model.layers.2.mlp.gate.e_score_correction_bias"].view(torch.uint8),
    )
    expert = last["decoder.layers.1.mlp.experts.linear_fc2.weight"][1]
    assert torch.equal(expert.view(torch.uint8), hf["model.layers.3.mlp.experts.7.down_proj.weight"].view(torch.uint8))


def test_a_rank_computes_with_whole_heads_and_pairs():
    """Its rows are whole key-value groups, and row i of its gate stands half its rows above row i of its up."""
    config, layout, rank = model("Qwen2ForCausalLM"), Layout(tensor=4), Rank(tensor=2)
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
    config, layout = model("Qwen2ForCausalLM"), Layout(tensor=2, pipeline=2)
    hf = weights("Qwen2ForCausalLM")
    shards = {rank: shard(config, hf, layout, rank) for rank in layout.ranks()}
    copy = shards[Rank(tensor=1, pipeline=1)]["output_layer.weight"]
    assert torch.equal(copy.view(torch.uint8), hf["model.embed_tokens.weight"][20:].view(torch.uint8))
    copy.view(torch.int16)[3, 5] += 1
    with pytest.raises(ModelError, match=r"another embedding\.word_embeddings\.weight than a rank before it"):
        join(config, layout, shards)


def test_experts_may_lie_on_the_tensor_parallel_ranks():
    config, layout = model("Qwen3MoeForCausalLM"), Layout(tensor=2, expert=2)
    hf = weights("Qwen3MoeForCausalLM")
    ranks = [Rank(tensor=0, expert=0), Rank(tensor=1, expert=1)]
    shards = {rank: shard(config, hf, layout, rank) for rank in ranks}
    assert_same_bits(join(config, layout, shards), hf)
    del shards[ranks[1]]
    with pytest.raises(ModelError, match="no rank given holds all of decoder"):
        join(config, layout, shards)


def test_missing_and_unexpected_tensors_are_named():
    config, layout = model("LlamaForCausalLM"), Layout()
    held = shard(config, weights("LlamaForCausalLM"), layout, Rank())
    held["extra"] = held.pop("decoder.final_layernorm.weight")
    with pytest.raises(ModelError, match=r"decoder\.final_layernorm\.weight, extra"):
        join(config, layout, {Rank(): held})


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("LlamaForCausalLM", Layout(tensor=8), "num_key_value_heads 4 into 8"),
        ("LlamaForCausalLM", Layout(pipeline=3), "num_hidden_layers 4 into 3"),
        ("LlamaForCausalLM", Layout(expert=2), "is dense"),
        ("Qwen3MoeForCausalLM", Layout(expert=3), "number of experts 8 into 3"),
    ],
)
def test_layouts_that_do_not_divide_the_model(name, layout, message):
    with pytest.raises(ModelError, match=message):
        shard(model(name), weights(name), layout, Rank())


def test_a_rank_outside_the_layout():
    with pytest.raises(ValueError, match="is outside"):
        shard(model("LlamaForCausalLM"), weights("LlamaForCausalLM"), Layout(tensor=2), Rank(tensor=2))


def test_names_and_shapes_are_those_of_the_model_that_megatron_builds(tiny_models):
    """One rank's shard is what the policy of one rank holds."""
    from zerokl.alignment.megatron.policy import MegatronPolicy

    for name in ("qwen2", "glm4-moe"):
        policy = MegatronPolicy(tiny_models[name])
        config = policy.config
        held = shard(config, read_hf_weights(tiny_models[name], config), Layout(), Rank())
        built = policy.model.state_dict()
        assert {k: tuple(t.shape) for k, t in held.items()} == {
            k: tuple(t.shape) for k, t in built.items() if isinstance(t, torch.Tensor)
        }


def test_a_distributed_checkpoint_is_read_in_other_layouts(tiny_models, tmp_path):
    folder = tiny_models["glm4-moe"]
    (tmp_path / "checkpoint").mkdir()
    script = str(Path(__file__).with_name("checkpoint_ranks.py"))
    ranks = [
        subprocess.Popen([sys.executable, "-P", script, str(r), str(folder), str(tmp_path)], stderr=subprocess.PIPE)
        for r in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    config = ModelConfig.load(folder)
    whole = hf_to_megatron(config, read_hf_weights(folder, config))
    for name, (layout, places) in READ.items():
        for r, place in enumerate(places):
            assert_same_bits(load_file(tmp_path / f"{name}-{r}.safetensors"), cut(config, whole, layout, place))
    assert "holds the weights of another model" in (tmp_path / "error-1").read_text()
