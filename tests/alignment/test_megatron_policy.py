"""MegatronPolicy: right log-probabilities, the same bits in any packing, exact training and resume."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.optimizer import OptimizerSettings, PortableAdam
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.types import Generation, Request, SamplingParams

LENGTHS = [(5, 7), (1, 3), (40, 20), (9, 1), (17, 12)]
SETTINGS = OptimizerSettings(learning_rate=1e-3, weight_decay=0.01)


def bits(tensor):
    return tensor.detach().view(torch.int32)


def mean_loss(logprobs, _index):
    return -logprobs.mean()


@pytest.fixture(scope="module")
def scorers(tiny_models):
    return {name: MegatronPolicy(folder) for name, folder in tiny_models.items()}


@pytest.fixture
def trainer(tiny_models):
    """A factory of fresh training policies."""
    return lambda name="qwen3-tied", **options: MegatronPolicy(tiny_models[name], optimizer=SETTINGS, **options)


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
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "qwen3"])
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


def test_a_step_learns_and_reports_the_logprobs_it_trained_on(trainer, make_pairs, pack):
    batches = [pack(make_pairs(LENGTHS[:3])), pack(make_pairs(LENGTHS[3:], seed=1))]
    policy = trainer()
    before = [bits(policy.logprobs(batch)) for batch in batches]
    digests = policy.weights_digest()
    first = policy.train_step(batches, mean_loss)
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, first.logprobs, strict=True))
    assert first.grad_norm > 0
    losses = [first.loss] + [policy.train_step(batches, mean_loss).loss for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3
    assert all(digest != digests[name] for name, digest in policy.weights_digest().items())
    assert policy.step == 5


def test_two_runs_give_the_same_bits(trainer, make_pairs, pack):
    batches = [pack(make_pairs(LENGTHS)), pack(make_pairs(LENGTHS, seed=1))]
    runs = []
    for _ in range(2):
        policy = trainer("llama")
        results = [policy.train_step(batches, mean_loss) for _ in range(2)]
        runs.append((policy.weights_digest(), [(r.loss, r.grad_norm) for r in results]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_model(tiny_models, make_pairs, pack, trainer, recompute):
    """Gradients in main_grad, summed over two microbatches, against transformers in fp32."""
    from transformers import AutoModelForCausalLM

    pairs = make_pairs([(4, 30), (20, 25)])
    policy = trainer("qwen3-tied", recompute=recompute)
    policy.set_learning_rate(0.0)
    policy.train_step([pack(pairs[:1]), pack(pairs[1:])], lambda logprobs, _: -logprobs.sum() / 55)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3-tied"], dtype=torch.float32)
    for request, generation in pairs:
        ids = torch.tensor([[*request.input_ids, *generation.output_ids]])
        first = len(request.input_ids) - 1
        logprobs = torch.log_softmax(model(ids).logits[0, first:-1], -1)
        (-logprobs.gather(1, ids[0, first + 1 :, None]).sum() / 55).backward()
    parameters = dict(policy.model.named_parameters())
    expected = dict(model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in expected.values()]).norm()
    scale = min(1.0, 1.0 / float(norm))  # Megatron clipped its own in place
    for ours, theirs in [
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("decoder.layers.0.mlp.linear_fc2.weight", "model.layers.0.mlp.down_proj.weight"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("decoder.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
    ]:
        got, want = parameters[ours].main_grad, expected[theirs].grad * scale
        assert (got - want).norm() < 0.05 * want.norm(), ours


def test_resume_is_bit_equal_to_an_uninterrupted_run(trainer, make_pairs, pack, tmp_path):
    batches = [[pack(make_pairs(LENGTHS, seed=seed))] for seed in range(4)]
    whole = trainer()
    results = [whole.train_step(batch, mean_loss) for batch in batches]
    first = trainer()
    for batch in batches[:2]:
        first.train_step(batch, mean_loss)
    first.save(tmp_path / "step-2")
    second = trainer()
    second.load(tmp_path / "step-2")
    assert second.step == 2
    resumed = [second.train_step(batch, mean_loss) for batch in batches[2:]]
    assert [(r.loss, r.grad_norm) for r in resumed] == [(r.loss, r.grad_norm) for r in results[2:]]
    assert second.weights_digest() == whole.weights_digest()
    second.save(tmp_path / "resumed")
    whole.save(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_torn_checkpoints_change_nothing(trainer, make_pairs, pack, tmp_path):
    policy = trainer()
    policy.train_step([pack(make_pairs(LENGTHS))], mean_loss)
    policy.save(tmp_path / "good")
    digests = policy.weights_digest()
    with pytest.raises(CheckpointError, match="already exists"):
        policy.save(tmp_path / "good")
    other = trainer()
    untouched = other.weights_digest()
    path = tmp_path / "good" / "optimizer.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is torn or changed.*earlier checkpoint"):
            other.load(tmp_path / "good")
        assert other.weights_digest() == untouched
    path.write_bytes(content)
    other.load(tmp_path / "good")
    assert other.weights_digest() == digests
    (tmp_path / "good" / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        other.load(tmp_path / "good")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good"]


def test_a_checkpoint_of_another_model_is_refused(trainer, tmp_path):
    trainer("qwen3").save(tmp_path / "step-0")
    with pytest.raises(CheckpointError, match="another model"):
        trainer("llama").load(tmp_path / "step-0")


def test_a_failed_save_leaves_nothing(trainer, tmp_path, monkeypatch):
    policy = trainer()
    monkeypatch.setattr("zerokl.alignment.megatron.checkpoint.json.dumps", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.save(tmp_path / "step-0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights(trainer, make_pairs, pack, bad):
    policy = trainer()
    digests = policy.weights_digest()
    with pytest.raises(FloatingPointError, match="the loss of microbatch 1"):
        policy.train_step([pack(make_pairs(LENGTHS))] * 2, lambda lp, index: lp.mean() * (bad if index else 1.0))
    assert policy.weights_digest() == digests
    assert policy.step == 0
    clean = trainer()
    batch = [pack(make_pairs(LENGTHS))]
    policy.train_step(batch, mean_loss)
    clean.train_step(batch, mean_loss)
    assert policy.weights_digest() == clean.weights_digest()


def test_a_gradient_norm_that_is_not_finite_leaves_the_weights(trainer, make_pairs, pack):
    class NaNGradient(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, gradient):
            return gradient * float("nan")

    policy = trainer()
    digests = policy.weights_digest()
    with pytest.raises(FloatingPointError, match="the gradient norm is nan"):
        policy.train_step([pack(make_pairs(LENGTHS))], lambda lp, _: NaNGradient.apply(lp).mean())
    assert policy.weights_digest() == digests
    assert policy.step == 0


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


def test_an_empty_step_is_refused(trainer):
    with pytest.raises(ValueError, match="no microbatches"):
        trainer().train_step([], mean_loss)


@pytest.mark.parametrize("change", [{"learning_rate": -1.0}, {"beta2": 1.0}, {"eps": 0.0}, {"clip_grad": float("nan")}])
def test_impossible_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(SETTINGS, **change)


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


def test_tensor_parallel_is_refused_clearly(scorers):
    from zerokl.alignment.megatron.modules import _require_one_rank

    class Group:
        def size(self):
            return 2

    linear = scorers["qwen3"].model.decoder.layers[0].mlp.linear_fc2
    group, linear.tp_group = linear.tp_group, Group()
    try:
        with pytest.raises(NotImplementedError, match=r"RowLinear: tensor parallel size 2.*contract R2"):
            _require_one_rank(linear)
    finally:
        linear.tp_group = group


def test_manifest_is_json(scorers):
    manifest = json.loads(json.dumps(scorers["qwen3"].manifest()))
    assert manifest["engine"] == "megatron-core"
    assert manifest["layers"] == "zerokl.kernels"
    assert manifest["model"]["architecture"] == "Qwen3ForCausalLM"


def test_weight_decay_spares_norms(tiny_models, make_pairs, pack):
    policy = MegatronPolicy(tiny_models["llama"], optimizer=OptimizerSettings(learning_rate=0.5, weight_decay=1.0))
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    policy.train_step([pack(make_pairs(LENGTHS))], lambda logprobs, _: logprobs.sum() * 0)
    for name, tensor in policy.named_weights():
        assert torch.equal(tensor, before[name] if tensor.dim() == 1 else before[name] * 0.5), name


def test_portable_adam_is_adamw():
    start = torch.randn(64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    portable, reference = PortableAdam([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(5):
        for parameter, optimizer in ((ours, portable), (theirs, reference)):
            parameter.grad = (start * (step + 1)).sin()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert portable.param_groups[0]["step"] == 5
    assert portable.state[ours].keys() == {"exp_avg", "exp_avg_sq"}
