"""Sparse models in MegatronPolicy: the model's own numbers, the same bits every time, along replayed experts too."""

import dataclasses

import numpy as np
import pytest
import torch

from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.alignment.megatron.moe import MoE
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.megatron.stock_moe import moe_options
from zerokl.alignment.routing import RoutingError

LENGTHS = [(5, 7), (1, 3), (40, 20), (9, 1), (17, 12)]
NAMES = ["qwen3-moe", "glm4-moe"]


def bits(tensor):
    return tensor.detach().view(torch.int32)


def mean_loss(logprobs, _index):
    return -logprobs.mean()


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def policy(tiny_models, name):
    """policy(options...): a training policy of the sparse model."""

    def make(**options):
        settings = OptimizerSettings(learning_rate=1e-3, weight_decay=0.01)
        return MegatronPolicy(tiny_models[name], optimizer=settings, **options)

    return make


@pytest.fixture(scope="module")
def reference(tiny_models, name):
    """transformers' own model in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_models[name], dtype=torch.float32)


def fed(request, generation):
    return torch.tensor([[*request.input_ids, *generation.output_ids[:-1]]])


def in_order(gate, out):
    """The experts a gate of transformers chose, best first; it leaves them in any order."""
    logits, _, indices = out
    bias = getattr(gate, "e_score_correction_bias", None)
    scores = logits if bias is None else logits.sigmoid() + bias
    return indices.gather(1, scores.gather(1, indices).argsort(-1, descending=True))


def reference_run(model, pairs):
    """(log-probabilities, pairs with the experts that the reference chose as routing records)."""
    scored, routed, chosen = [], [], []
    gates = [module for path, module in model.named_modules() if path.endswith(".mlp.gate")]
    hooks = [gate.register_forward_hook(lambda gate, _in, out: chosen.append(in_order(gate, out))) for gate in gates]
    for request, generation in pairs:
        chosen.clear()
        out = model(fed(request, generation))
        record = torch.stack(chosen, 1).to(torch.uint8).numpy()
        routed.append((request, dataclasses.replace(generation, routed_experts=record)))
        targets = torch.tensor(generation.output_ids)[:, None]
        logprobs = torch.log_softmax(out.logits[0, len(request.input_ids) - 1 :], -1)
        scored.append(logprobs.gather(1, targets)[:, 0])
    for hook in hooks:
        hook.remove()
    return torch.cat(scored), routed


def own_routing(policy, pairs, pack, monkeypatch):
    """The pairs with the experts that the policy itself chooses, as records."""
    chosen, route = {}, MoE.route

    def watched(self, logits):
        routing = route(self, logits)
        chosen[self.layer] = routing.indices
        return routing

    with monkeypatch.context() as patch:
        patch.setattr(MoE, "route", watched)
        batch = pack(pairs)
        policy.logprobs(batch)
    records = torch.stack([chosen[layer] for layer in sorted(chosen)], 1).to(torch.uint8).numpy()
    parts = np.split(records, batch.cu_seqlens[1:-1].numpy())
    return [(r, dataclasses.replace(g, routed_experts=part)) for (r, g), part in zip(pairs, parts, strict=True)]


def test_logprobs_are_the_models(policy, reference, make_pairs, pack):
    """Along the reference's experts: near a tie, bf16 would choose others."""
    expected, pairs = reference_run(reference, make_pairs(LENGTHS))
    ours = policy(replay="on").logprobs(pack(pairs))
    assert (ours - expected).abs().max() < 0.08
    assert (ours - expected).abs().mean() < 0.015


def test_the_live_choice_is_the_models_almost_everywhere(policy, reference, make_pairs, pack):
    pairs = reference_run(reference, make_pairs(LENGTHS))[1]
    sparse = policy(replay="check")
    batch = pack(pairs)
    sparse.logprobs(batch)
    assert sparse.differing_tokens < batch.tokens.numel() // 4


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_model(policy, reference, make_pairs, pack, recompute):
    """In main_grad, summed over two micro-batches, against transformers in fp32 along the same experts."""
    reference.zero_grad()
    expected, pairs = reference_run(reference, make_pairs([(4, 30), (20, 25)]))
    (-expected.sum() / 55).backward()
    sparse = policy(replay="on", recompute=recompute)
    sparse.set_learning_rate(0.0)
    sparse.train_step([pack(pairs[:1]), pack(pairs[1:])], lambda logprobs, _: -logprobs.sum() / 55)
    compared = 0
    theirs, ours = dict(reference.named_parameters()), dict(sparse.model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in theirs.values()]).norm()
    scale = min(1.0, 1.0 / float(norm))  # Megatron clipped its own in place
    for mine, other in [
        ("mlp.router.weight", "mlp.gate.weight"),
        ("mlp.experts.linear_fc1.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.linear_fc2.weight", "mlp.experts.down_proj"),
        ("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight"),
        ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ]:
        for layer in (0, 1):
            if f"decoder.layers.{layer}.{mine}" not in ours:
                continue  # a dense layer, or one without shared experts
            compared += 1
            got = ours[f"decoder.layers.{layer}.{mine}"].main_grad
            want = theirs[f"model.layers.{layer}.{other}"].grad * scale
            assert got.norm() > 0
            assert (got - want).norm() < 0.06 * want.norm(), (layer, mine)
    assert compared == {"qwen3_moe": 2 * 4, "glm4_moe": 5 + 1}[reference.config.model_type]


def test_packing_order_and_microbatches_change_no_bit(policy, make_pairs, pack):
    pairs, sparse = make_pairs(LENGTHS), policy()
    alone = [bits(sparse.logprobs(pack([pair]))) for pair in pairs]
    assert torch.equal(bits(sparse.logprobs(pack(pairs))), torch.cat(alone))
    assert torch.equal(bits(sparse.logprobs(pack(pairs[::-1]))), torch.cat(alone[::-1]))


def test_training_has_the_same_bits_replayed_recomputed_and_repeated(policy, make_pairs, pack, monkeypatch):
    pairs = own_routing(policy(), make_pairs(LENGTHS), pack, monkeypatch)
    outcomes = []
    for options in ({}, {"recompute": True}, {"replay": "on"}, {"replay": "check", "recompute": True}):
        sparse = policy(**options)
        before = sparse.weights_digest()
        first = sparse.train_step([pack(pairs[:2]), pack(pairs[2:])], mean_loss)
        after = sparse.weights_digest()
        changed = [name for name in after if after[name] != before[name]]
        assert any(name.endswith("mlp.gate.weight") for name in changed)
        assert sum(".experts." in name for name in changed) > 8
        assert first.differing_tokens == 0
        outcomes.append((first.loss, first.grad_norm, [bits(x).tolist() for x in first.logprobs], after))
    assert outcomes[1:] == outcomes[:1] * 3


def test_records_of_the_token_before_are_counted(policy, make_pairs, pack, monkeypatch):
    sparse = policy(replay="check")
    pairs = own_routing(policy(), make_pairs(LENGTHS), pack, monkeypatch)
    right = sparse.logprobs(pack(pairs))
    assert sparse.differing_tokens == 0
    shifted = [(r, dataclasses.replace(g, routed_experts=np.roll(g.routed_experts, 1, 0))) for r, g in pairs]
    batch = pack(shifted)
    wrong = sparse.logprobs(batch)
    assert sparse.differing_tokens > batch.tokens.numel() // 2
    assert not torch.equal(bits(right), bits(wrong))
    assert sparse.train_step([batch], mean_loss).differing_tokens > batch.tokens.numel() // 2


def test_a_step_without_its_records_changes_nothing(policy, make_pairs, pack, monkeypatch):
    sparse = policy(replay="on")
    digests = sparse.weights_digest()
    with pytest.raises(RoutingError, match="has no routing records"):
        sparse.train_step([pack(make_pairs(LENGTHS))], mean_loss)
    pairs = own_routing(policy(), make_pairs(LENGTHS), pack, monkeypatch)
    route = MoE.route

    def forgetful(self, logits):
        if self.layer == 1:
            self.replay = None
        return route(self, logits)

    monkeypatch.setattr(MoE, "route", forgetful)
    with pytest.raises(RoutingError, match="layer 1 took its routing records 0 times, 1 expected"):
        sparse.train_step([pack(pairs)], mean_loss)
    assert sparse.weights_digest() == digests


def test_a_checkpoint_continues_bit_for_bit(policy, make_pairs, pack, tmp_path):
    batches = [[pack(make_pairs(LENGTHS, seed=seed))] for seed in range(2)]
    whole = policy()
    whole.train_step(batches[0], mean_loss)
    whole.save(tmp_path / "step-1")
    second = policy()
    second.load(tmp_path / "step-1")
    for sparse in (whole, second):
        sparse.train_step(batches[1], mean_loss)
    assert second.weights_digest() == whole.weights_digest()


def test_the_selection_bias_travels_but_is_not_trained(policy, make_pairs, pack, name, tmp_path):
    sparse = policy()
    biases = {n: t.clone() for n, t in sparse.named_weights() if n.endswith("e_score_correction_bias")}
    assert len(biases) == (1 if name == "glm4-moe" else 0)
    sparse.train_step([pack(make_pairs(LENGTHS))], mean_loss)
    sparse.export_hf(tmp_path / "exported")
    again = MegatronPolicy(tmp_path / "exported")
    assert again.weights_digest() == sparse.weights_digest()
    for n, tensor in again.named_weights():
        if n in biases:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, biases[n])


def test_what_is_not_supported(policy, tiny_models):
    with pytest.raises(ModelError, match="Qwen3ForCausalLM is dense, it routes nothing"):
        MegatronPolicy(tiny_models["qwen3"], replay="on")
    with pytest.raises(ModelError, match="stock layers replay routing without recomputation only"):
        policy(stock=True, replay="on", recompute=True)


def test_megatrons_own_layers_are_the_same_model(policy, reference, make_pairs, pack):
    """Along the reference's experts, padded to rows of unequal length, and in their own arithmetic."""
    expected, pairs = reference_run(reference, make_pairs(LENGTHS))
    stock = policy(stock=True, replay="check")
    assert stock.weights_digest() == policy().weights_digest()
    batch = pack(pairs)
    scored = stock.logprobs(batch)
    assert (scored - expected).abs().mean() < 0.015
    assert (scored - expected).abs().max() < 0.08
    assert 0 < stock.differing_tokens <= batch.tokens.numel()
    assert not torch.equal(bits(scored), bits(policy(replay="on").logprobs(batch)))


def test_megatrons_own_layers_train_along_the_records(policy, reference, make_pairs, pack):
    stock = policy(stock=True, replay="on")
    pairs = reference_run(reference, make_pairs(LENGTHS))[1]
    first = stock.train_step([pack(pairs[:2]), pack(pairs[2:])], mean_loss)
    assert stock.train_step([pack(pairs[:2]), pack(pairs[2:])], mean_loss).loss < first.loss
    with pytest.raises(RoutingError, match="has no routing records"):
        stock.logprobs(pack(make_pairs(LENGTHS)))


def test_a_router_that_megatron_cannot_express(tiny_models):
    config = ModelConfig.load(tiny_models["glm4-moe"])
    three = dataclasses.replace(config.moe.router, top_k=6)
    with pytest.raises(ModelError, match="groups that keep other than two experts each"):
        moe_options(dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=three)))
