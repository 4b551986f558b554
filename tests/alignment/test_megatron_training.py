"""Training with MegatronPolicy: right gradients, the same bits every time, exact resume, no update from NaN."""

from dataclasses import replace

import pytest
import torch

from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.optimizer import OptimizerSettings, PortableAdam
from zerokl.alignment.megatron.policy import MegatronPolicy

LENGTHS = [(5, 7), (1, 3), (40, 20), (9, 1), (17, 12)]


def bits(tensor):
    return tensor.detach().view(torch.int32)


def mean_loss(logprobs, _index):
    return -logprobs.mean()


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


@pytest.mark.parametrize(("name", "recompute"), [("qwen2", False), ("qwen3-tied", False), ("qwen3-tied", True)])
def test_gradients_are_those_of_the_model(tiny_models, make_pairs, pack, trainer, name, recompute):
    """Gradients in main_grad, summed over two microbatches, against transformers in fp32."""
    from transformers import AutoModelForCausalLM

    pairs = make_pairs([(4, 30), (20, 25)])
    policy = trainer(name, recompute=recompute)
    policy.set_learning_rate(0.0)
    policy.train_step([pack(pairs[:1]), pack(pairs[1:])], lambda logprobs, _: -logprobs.sum() / 55)
    model = AutoModelForCausalLM.from_pretrained(tiny_models[name], dtype=torch.float32)
    for request, generation in pairs:
        ids = torch.tensor([[*request.input_ids, *generation.output_ids]])
        first = len(request.input_ids) - 1
        logprobs = torch.log_softmax(model(ids).logits[0, first:-1], -1)
        (-logprobs.gather(1, ids[0, first + 1 :, None]).sum() / 55).backward()
    parameters = dict(policy.model.named_parameters())
    expected = dict(model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in expected.values()]).norm()
    scale = min(1.0, 1.0 / float(norm))  # Megatron clipped its own in place
    if name == "qwen2":
        bias = torch.cat([expected[f"model.layers.1.self_attn.{x}_proj.bias"].grad.view(2, -1) for x in "qkv"], 1)
        got, want = parameters["decoder.layers.1.self_attention.linear_qkv.bias"].main_grad, bias.flatten() * scale
        assert (got - want).norm() < 0.05 * want.norm(), "bias"
    for ours, theirs in [
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("decoder.layers.0.mlp.linear_fc2.weight", "model.layers.0.mlp.down_proj.weight"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("decoder.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
    ]:
        if ours not in parameters:
            continue  # head norms are Qwen3's
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


def test_an_empty_step_is_refused(trainer):
    with pytest.raises(ValueError, match="no microbatches"):
        trainer().train_step([], mean_loss)


def test_micro_batches_add_up_by_their_order(trainer, make_pairs, pack):
    """However they are handed in; losses and results count them as handed in. Without orders, other bits."""
    pairs = make_pairs([(5, 8), (3, 4), (39, 62), (9, 2)])
    batches = [replace(pack([pair]), order=number) for number, pair in enumerate(pairs)]

    def train(handed_in):
        policy, sizes = trainer(), {}
        policy.set_learning_rate(0.0)

        def loss(logprobs, index):
            sizes[index] = logprobs.numel()
            return -logprobs.mean()

        result = policy.train_step(handed_in, loss)
        assert sizes == {index: batch.rows.numel() for index, batch in enumerate(handed_in)}
        gradients = torch.cat([p.main_grad.flatten() for p in policy.model.parameters()])
        return result.logprobs, result.loss, bits(gradients).clone()

    logprobs, loss, gradients = train(batches)
    again, same_loss, same = train(batches[::-1])
    assert loss == same_loss
    assert torch.equal(gradients, same)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(logprobs, again[::-1], strict=True))
    assert not torch.equal(gradients, train([replace(batch, order=0) for batch in batches[::-1]])[2])


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


class Turns:
    """New memory for every version, full of garbage; ``versions``: all that there were."""

    def __init__(self, policy):
        self.policy, self.versions = policy, []

    def __call__(self):
        live, _, _ = self.policy.weight_blocks()
        garbage = {name: torch.full((x.nbytes,), 0xFF, dtype=torch.uint8) for name, x in live.items()}
        self.versions.append(garbage)
        return garbage


def as_they_lie(policy):
    live, _, _ = policy.weight_blocks()
    return {name: (x.data_ptr(), x.view(-1).view(torch.uint8).clone()) for name, x in live.items()}


@pytest.mark.parametrize("name", ["qwen3-tied", "glm4-moe"])  # with what is not trained, too
def test_new_memory_takes_the_new_weights_and_leaves_the_old(trainer, make_pairs, pack, tmp_path, name):
    batches = [[pack(make_pairs(LENGTHS, seed=seed))] for seed in range(3)]
    plain = trainer(name)
    expected = [(plain.train_step(batch, mean_loss), plain.weights_digest()) for batch in batches]
    moving = trainer(name)
    moving.save(tmp_path / "start")
    memory = moving.new_memory = Turns(moving)
    for number, batch in enumerate(batches):
        before = as_they_lie(moving)
        result = moving.train_step(batch, mean_loss)
        assert (result.loss, result.grad_norm) == (expected[number][0].loss, expected[number][0].grad_norm)
        assert moving.weights_digest() == expected[number][1]
        assert len(memory.versions) == number + 1
        for key, (place, _) in as_they_lie(moving).items():
            assert place == memory.versions[-1][key].data_ptr() != before[key][0]
        if number:
            assert all(torch.equal(memory.versions[-2][key], held) for key, (_, held) in before.items())
    last = {key: held.clone() for key, held in memory.versions[-1].items()}
    moving.load(tmp_path / "start")
    assert moving.weights_digest() == trainer(name).weights_digest()
    assert all(torch.equal(memory.versions[-2][key], held) for key, held in last.items())


def test_a_step_that_fails_asks_for_no_memory(trainer, make_pairs, pack):
    policy = trainer()
    memory = policy.new_memory = Turns(policy)
    with pytest.raises(FloatingPointError):
        policy.train_step([pack(make_pairs(LENGTHS))], lambda logprobs, _: logprobs.mean() * float("nan"))
    assert memory.versions == []
