"""MegatronPolicy: the model's log-probabilities, in the same bits however they are packed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.types import Generation, Request, SamplingParams

LENGTHS = [(5, 7), (1, 3), (40, 20), (9, 1), (17, 12)]


def bits(tensor):
    return tensor.detach().view(torch.int32)


def mean_loss(logprobs, _index):
    return -logprobs.mean()


@pytest.fixture(scope="module")
def scorers(tiny_models):
    from zerokl.orchestrate.callables import load_architecture

    plugin = load_architecture("examples/ernie45.py:ERNIE_45", Path(__file__).parents[2])
    return {name: MegatronPolicy(folder, architecture=plugin) for name, folder in tiny_models.items()}


def reference_logprobs(folder, pairs):
    """transformers' own forward in fp32, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scored = []
    for request, generation in pairs:
        ids = torch.tensor([[*request.input_ids, *generation.output_ids]])
        first = len(request.input_ids) - 1
        logits = model(ids).logits[0, first:-1] / request.sampling.temperature
        scored.append(torch.log_softmax(logits, -1).gather(1, ids[0, first + 1 :, None])[:, 0])
    return torch.cat(scored)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied", "qwen3", "ernie45"])
def test_logprobs_are_the_models(scorers, tiny_models, make_pairs, pack, name, temperature):
    pairs = make_pairs(LENGTHS, temperature=temperature)
    ours = scorers[name].logprobs(pack(pairs))
    expected = reference_logprobs(tiny_models[name], pairs)
    assert ours.dtype == torch.float32
    assert ours.requires_grad
    # bf16 activations against fp32 ones; a wrong rotation, norm or head is off by whole units
    assert (ours - expected).abs().max() < 0.08
    assert (ours - expected).abs().mean() < 0.015


TEXTS = [
    ("The capital of France is Paris, and the capital of Italy is Rome.", 4),
    ("One, two, three, four, five, six", 1),
]


def split(ids, prompt):
    zeros = np.zeros(len(ids) - prompt, np.float32)
    return Request(tuple(ids[:prompt]), SamplingParams()), Generation(tuple(ids[prompt:]), zeros, zeros, "length", "0")


def test_a_real_model(smollm, pack):
    """Tied embeddings, 9 query heads on 3 key-value heads, 30 layers deep."""
    from transformers import AutoTokenizer

    policy = MegatronPolicy(smollm, optimizer=OptimizerSettings(learning_rate=1e-4))
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    pairs = [split(tokenizer(text).input_ids, prompt) for text, prompt in TEXTS]
    batch = pack(pairs)
    ours = policy.logprobs(batch)
    expected = reference_logprobs(smollm, pairs)
    assert expected.mean() > -5  # the model knows these words: bf16 noise stays small
    assert (ours - expected).abs().max() < 0.2
    assert (ours - expected).abs().mean() < 0.04
    assert torch.equal(bits(ours), torch.cat([bits(policy.logprobs(pack([pair]))) for pair in pairs]))
    first = policy.train_step([batch], mean_loss)
    assert torch.equal(bits(first.logprobs[0]), bits(ours))
    assert policy.train_step([batch], mean_loss).loss < first.loss


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "qwen3"])
def test_packing_order_and_microbatches_change_no_bit(scorers, make_pairs, pack, name):
    pairs = make_pairs(LENGTHS)
    alone = [bits(scorers[name].logprobs(pack([pair]))) for pair in pairs]
    together = bits(scorers[name].logprobs(pack(pairs)))
    backwards = bits(scorers[name].logprobs(pack(pairs[::-1])))
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(backwards, torch.cat(alone[::-1]))


def test_gradients_and_recomputation_change_no_bit(scorers, tiny_models, make_pairs, pack):
    batch = pack(make_pairs(LENGTHS))
    with_gradients = scorers["qwen3"].logprobs(batch)
    with torch.no_grad():
        without = scorers["qwen3"].logprobs(batch)
    recomputed = MegatronPolicy(tiny_models["qwen3"], recompute=True).logprobs(batch)
    assert recomputed.requires_grad
    assert torch.equal(bits(with_gradients), bits(without))
    assert torch.equal(bits(with_gradients), bits(recomputed))


def test_export_is_a_model_that_loads_again(trainer, make_pairs, pack, tmp_path):
    policy = trainer()
    policy.train_step([pack(make_pairs(LENGTHS))], mean_loss)
    policy.export_hf(tmp_path / "exported")
    again = MegatronPolicy(tmp_path / "exported")
    assert again.weights_digest() == policy.weights_digest()
    assert (tmp_path / "exported" / "tokenizer_config.json").is_file()
    batch = pack(make_pairs(LENGTHS))
    assert torch.equal(bits(again.logprobs(batch)), bits(policy.logprobs(batch)))
    with pytest.raises(CheckpointError, match="already exists"):
        policy.export_hf(tmp_path / "exported")


def test_digests_name_the_files_tensors(scorers, tiny_models):
    import xxhash

    digests = scorers["llama"].weights_digest()
    source = load_file(tiny_models["llama"] / "model.safetensors")
    assert digests == {
        name: xxhash.xxh3_128(source[name].view(torch.uint8).numpy().tobytes()).hexdigest() for name in digests
    }
    assert digests.keys() == source.keys()


def test_stock_layers_score_and_train_but_not_in_our_bits(trainer, scorers, make_pairs, pack):
    pairs = make_pairs(LENGTHS)
    stock = trainer("qwen3", stock=True)
    ours, theirs = scorers["qwen3"].logprobs(pack(pairs)), stock.logprobs(pack(pairs))
    assert (ours - theirs).abs().max() < 0.1
    assert not torch.equal(bits(ours), bits(theirs))
    cool = make_pairs(LENGTHS, temperature=0.7)
    assert (scorers["qwen3"].logprobs(pack(cool)) - stock.logprobs(pack(cool))).abs().max() < 0.15
    first = stock.train_step([pack(pairs)], mean_loss)
    assert stock.train_step([pack(pairs)], mean_loss).loss < first.loss


def test_what_cannot_be_scored_or_trained(scorers, make_pairs, pack):
    with pytest.raises(ValueError, match="exceeds the model's 512"):
        scorers["llama"].logprobs(pack(make_pairs([(500, 20)])))
    with pytest.raises(ValueError, match="no scored rows"):
        scorers["llama"].logprobs(pack(make_pairs([(5, 0)])))
    with pytest.raises(RuntimeError, match="only scores"):
        scorers["llama"].train_step([pack(make_pairs(LENGTHS))], mean_loss)


@pytest.mark.parametrize("change", [{"learning_rate": -1.0}, {"beta2": 1.0}, {"eps": 0.0}, {"clip_grad": float("nan")}])
def test_impossible_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        OptimizerSettings(**change)


def test_parameters_keep_megatrons_parallel_attributes(scorers):
    policy = scorers["qwen3"]
    parameters = dict(policy.model.named_parameters())
    fc1 = parameters["decoder.layers.0.mlp.linear_fc1.weight"]
    fc2 = parameters["decoder.layers.0.mlp.linear_fc2.weight"]
    assert (fc1.tensor_model_parallel, fc1.partition_dim, fc1.partition_stride) == (True, 0, 2)
    assert (fc2.tensor_model_parallel, fc2.partition_dim) == (True, 1)
    assert parameters["decoder.final_layernorm.weight"].sequence_parallel is False
    sharded = policy.model.sharded_state_dict()
    assert set(parameters) <= {key for key in sharded if not key.endswith("_extra_state")} | set(parameters)
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in sharded


def test_manifest_is_json(scorers):
    manifest = json.loads(json.dumps(scorers["qwen3"].manifest()))
    assert manifest["engine"] == "megatron-core"
    assert manifest["layers"] == "zerokl.kernels"
    assert manifest["model"]["architecture"] == "Qwen3ForCausalLM"
