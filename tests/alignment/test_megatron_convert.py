"""Weights to Megatron and back, bit for bit, and clear errors for models that cannot be used."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from zerokl.alignment.megatron.convert import hf_shapes, hf_to_megatron, megatron_to_hf, read_hf_weights
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError

NAMES = ["llama", "qwen3-tied", "qwen2", "qwen3", "qwen3-moe", "glm4-moe"]


@pytest.fixture
def broken(tiny_models, tmp_path):
    """A copy of the tied Qwen3 model to damage."""
    return shutil.copytree(tiny_models["qwen3-tied"], tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def assert_round_trip(folder):
    config = ModelConfig.load(folder)
    source = load_file(folder / "model.safetensors")
    back = dict(megatron_to_hf(config, hf_to_megatron(config, read_hf_weights(folder, config))))
    assert back.keys() == source.keys() == hf_shapes(config).keys()
    for key, tensor in source.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key].view(torch.int16), tensor.view(torch.int16)), key


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bitwise(tiny_models, name):
    assert_round_trip(tiny_models[name])


def test_round_trip_of_a_real_model_is_bitwise(smollm):
    assert_round_trip(smollm)


def test_query_rows_stand_before_their_key_and_value(tiny_models):
    config = ModelConfig.load(tiny_models["llama"])
    hf = read_hf_weights(tiny_models["llama"], config)
    fused = hf_to_megatron(config, hf)["decoder.layers.0.self_attention.linear_qkv.weight"]
    head, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    second = fused[(group + 2) * head :]  # the second key-value head's rows
    assert torch.equal(second[:head], hf["model.layers.0.self_attn.q_proj.weight"][group * head : (group + 1) * head])
    assert torch.equal(second[group * head : (group + 1) * head], hf["model.layers.0.self_attn.k_proj.weight"][head:])


def test_gate_and_up_are_views(tiny_models):
    config = ModelConfig.load(tiny_models["llama"])
    state = hf_to_megatron(config, read_hf_weights(tiny_models["llama"], config))
    up = dict(megatron_to_hf(config, state))["model.layers.1.mlp.up_proj.weight"]
    storage = state["decoder.layers.1.mlp.linear_fc1.weight"].untyped_storage()
    assert up.untyped_storage().data_ptr() == storage.data_ptr()


def test_an_experts_tensors_are_views_of_the_stacked_ones(tiny_models):
    config = ModelConfig.load(tiny_models["qwen3-moe"])
    hf = read_hf_weights(tiny_models["qwen3-moe"], config)
    state = hf_to_megatron(config, hf)
    fc1 = state["decoder.layers.1.mlp.experts.linear_fc1.weight"]
    width = config.moe.intermediate_size
    assert fc1.shape == (8, 2 * width, 128)
    assert torch.equal(fc1[5, :width], hf["model.layers.1.mlp.experts.5.gate_proj.weight"])
    up = dict(megatron_to_hf(config, state))["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert up.data_ptr() == fc1[5, width:].data_ptr()


def test_sharded_checkpoint(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["llama"], tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = read_hf_weights(folder, ModelConfig.load(folder))
    assert all(torch.equal(read[key], weights[key]) for key in names)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors does not exist"):
        read_hf_weights(folder, ModelConfig.load(folder))


def test_a_repeated_tied_head_must_equal_the_embedding(broken):
    config = ModelConfig.load(broken)
    edit_weights(broken, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in read_hf_weights(broken, config)
    edit_weights(broken, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match="ties the embeddings"):
        read_hf_weights(broken, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"missing model\.norm\.weight"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), r"unexpected extra\.weight"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3).bfloat16()}), r"has shape \(3,\), needs \(128,\)"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(128)}), r"is torch\.float32, needs torch\.bfloat16"),
    ],
)
def test_wrong_tensors_are_named(broken, change, message):
    edit_weights(broken, change)
    with pytest.raises(ModelError, match=message):
        read_hf_weights(broken, ModelConfig.load(broken))


def test_truncated_weights(broken):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged.*download it again"):
        read_hf_weights(broken, ModelConfig.load(broken))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rotary scaling 'llama3' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for Qwen3ForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"num_key_value_heads": 3}, "do not divide"),
    ],
)
def test_unsupported_configs(broken, changes, message):
    edit_config(broken, **changes)
    with pytest.raises(ModelError, match=message):
        ModelConfig.load(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "2 of 3 groups of 16 experts do not exist"),
        ({"topk_group": 5}, "5 of 4 groups of 16 experts do not exist"),
        ({"first_k_dense_replace": 2}, "leaves no sparse layer of 2"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor must be a positive number"),
        ({"n_shared_experts": 0}, "n_shared_experts must be a positive integer"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be an integer"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.3}}, "9.6 of 32 dimensions"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
    ],
)
def test_unsupported_groups_and_shared_experts(tiny_models, tmp_path, changes, message):
    folder = shutil.copytree(tiny_models["glm4-moe"], tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        ModelConfig.load(folder)


def test_a_selection_bias_stays_fp32(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["glm4-moe"], tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit_weights(folder, lambda w: w.update({name: w[name].bfloat16()}))
    with pytest.raises(ModelError, match=r"e_score_correction_bias is torch\.bfloat16, needs torch\.float32"):
        read_hf_weights(folder, ModelConfig.load(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, "every layer must be sparse"),
        ({"decoder_sparse_step": 2}, "every layer must be sparse"),
        ({"num_local_experts": None}, "num_local_experts must be a positive integer"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 8"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive integer"),
    ],
)
def test_unsupported_experts(tiny_models, tmp_path, changes, message):
    folder = shutil.copytree(tiny_models["qwen3-moe"], tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        ModelConfig.load(folder)


def test_missing_folder_and_bad_json(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        ModelConfig.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        ModelConfig.load(tmp_path)


def test_rotary_base_before_transformers_5(broken):
    config = json.loads((broken / "config.json").read_text())
    del config["rope_parameters"]
    (broken / "config.json").write_text(json.dumps(config | {"rope_theta": 1234.0}))
    assert ModelConfig.load(broken).rope_theta == 1234.0
