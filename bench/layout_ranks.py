"""The ranks of `bench/layouts.py`, forked from one process that has imported all: ``DEVICE FOLDER RANKS ONLY``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.multiprocessing import start_processes

from zerokl.alignment.megatron import distributed
from zerokl.alignment.megatron.convert import hf_dtype, hf_shapes
from zerokl.alignment.megatron.core import parallel_state
from zerokl.alignment.megatron.layout import Layout
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.megatron.shard import Held, take
from zerokl.alignment.routing import Router
from zerokl.alignment.routing_replay import record_dtype
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams

SEGMENTS = 4
# Prompts and answers. Tokens fed (one less than both) and scored are even in number: so cuts between micro-batches are
# cuts between pairs, and gradients keep their bits (contract R9).
LENGTHS = [(5, 8), (3, 4), (39, 62), (9, 2), (17, 32), (3, 90), (9, 10), (31, 36)]
VOCABULARY = 320
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    # a dense layer first, biases, groups of experts, a selection bias, shared experts
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
    },
}
SPARSE = ("qwen3_moe", "glm4_moe")


@dataclass(frozen=True)
class Case:
    """One row: how the model is laid out, and how the sequences are dealt.

    ``batches``: sequences of each micro-batch; ``dealt``: data-parallel ranks share the micro-batches, otherwise each
    runs all of them with a loss scaled down by their number, an exact power of two. ``replayed``: along drawn experts,
    compared with one rank along the same. ``backwards``: the micro-batches are handed in last first. ``control``:
    another order of addition, whose bits must differ, or the comparison shows nothing.
    """

    model: str
    name: str
    layout: Layout
    batches: Sequence[Sequence[int]] = ((0, 1), (2, 3), (4, 5), (6, 7))
    dealt: bool = False
    recompute: bool = False
    pad_to: int = 1
    replayed: bool = False
    backwards: bool = False
    control: bool = False


ONE = Layout(segments=SEGMENTS)
_TOGETHER, _ALONE = (tuple(range(8)),), tuple((i,) for i in range(8))


def cases() -> list[Case]:
    """Every row, each model's first being the reference of its others; the same layouts next to each other."""
    return _one_rank() + _dense() + _sparse()


def _one_rank() -> list[Case]:
    rows = [Case(model, "one rank", ONE) for model in MODELS]
    rows += [Case(model, "one rank, replayed", ONE, replayed=True) for model in SPARSE]
    rows += [Case(model, "recompute, replayed", ONE, replayed=True, recompute=True) for model in SPARSE]
    rows += [Case(model, "micro-batches of 8", ONE, batches=_TOGETHER) for model in MODELS]
    rows += [Case(model, "micro-batches handed in backwards", ONE, backwards=True) for model in MODELS]
    rows += [Case(model, "recompute", ONE, recompute=True) for model in MODELS]
    rows += [Case(model, "DP 4", ONE, dealt=True) for model in MODELS]
    rows += [Case(model, "one segment: must differ", Layout(), control=True) for model in MODELS]
    for model in ("llama", "glm4_moe"):
        rows += [Case(model, "micro-batches of 1", ONE, batches=_ALONE), Case(model, "padded to 64", ONE, pad_to=64)]
    return rows


def _dense() -> list[Case]:
    rows = []
    for model in ("llama", "qwen3"):
        for ranks in (2, 4):
            name, layout = f"TP {ranks}", Layout(tensor=ranks, segments=SEGMENTS)
            rows.append(Case(model, name, layout))
            rows.append(Case(model, f"{name}, sequence parallel", replace(layout, sequence_parallel=True)))
    four, pair = Layout(tensor=4, segments=SEGMENTS), Layout(tensor=2, segments=SEGMENTS)
    rows.append(
        Case("llama", "TP 4, sequence parallel, recompute", replace(four, sequence_parallel=True), recompute=True)
    )
    rows.append(Case("qwen3", "DP 2, TP 2", pair, dealt=True))
    stages = Layout(pipeline=2, segments=SEGMENTS)
    rows += [Case(model, "PP 2", stages) for model in ("llama", "qwen3")]
    rows.append(Case("llama", "PP 4", replace(stages, pipeline=4)))
    virtual = replace(stages, virtual_pipeline=2)
    rows += [Case(model, "PP 2, virtual 2", virtual) for model in ("llama", "qwen3")]
    rows.append(Case("llama", "PP 2, virtual 2, recompute", virtual, recompute=True))
    both = replace(stages, tensor=2, sequence_parallel=True)
    rows.append(Case("qwen3", "PP 2, TP 2, sequence parallel", both))
    positions = Layout(context=2, segments=SEGMENTS)
    rows += [Case(model, "CP 2", positions) for model in ("llama", "qwen3")]
    rows.append(Case("llama", "CP 2, recompute", positions, recompute=True))
    rows.append(Case("qwen3", "CP 2, TP 2, sequence parallel", replace(positions, tensor=2, sequence_parallel=True)))
    return rows


def _sparse() -> list[Case]:
    rows = []
    pair, stages = Layout(tensor=2, segments=SEGMENTS), Layout(pipeline=2, segments=SEGMENTS)
    parallel = replace(pair, sequence_parallel=True)
    for model in SPARSE:
        for ranks in (2, 4):
            layout = Layout(expert=ranks, segments=SEGMENTS)
            rows.append(Case(model, f"EP {ranks}", layout))
            rows.append(Case(model, f"DP 4, EP {ranks}", layout, dealt=True))
        rows.append(Case(model, "EP 4, recompute, replayed", layout, recompute=True, replayed=True))
        rows.append(Case(model, "TP 2, sequence parallel", parallel))
        rows.append(Case(model, "PP 2", stages))
        both = replace(stages, tensor=2, expert=2)
        rows.append(Case(model, "PP 2, TP 2, EP 2, replayed", both, replayed=True))
        rows.append(Case(model, "CP 2", Layout(context=2, segments=SEGMENTS)))
    rows.append(Case(model, "TP 2", pair))
    rows.append(Case(model, "DP 2, TP 2, EP 4", replace(pair, expert=4), dealt=True))
    mixed = replace(parallel, expert=2)
    name = "TP 2, EP 2, sequence parallel, recompute, replayed"
    rows.append(Case(model, name, mixed, recompute=True, replayed=True))
    rows.append(Case(model, "TP 4, EP 4", Layout(tensor=4, expert=4, segments=SEGMENTS)))
    virtual = replace(stages, virtual_pipeline=2)
    rows.append(Case(model, "PP 2, virtual 2", virtual))
    rows.append(Case(model, "PP 2, virtual 2, recompute, replayed", virtual, recompute=True, replayed=True))
    rows.append(Case(model, "CP 2, TP 2, EP 4, replayed", replace(pair, context=2, expert=4), replayed=True))
    return rows


def make_model(folder: Path, raw: dict[str, Any]) -> Path:
    """A random model of the sizes above, in Hugging Face form."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_SIZES | raw))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in hf_shapes(ModelConfig.load(folder)).items():
        x = torch.rand(shape, generator=generator) - 0.5
        # strong row-parallel products: the residual stream keeps what another order of addition changes in them
        scale = 6.4 if "o_proj" in name or "down_proj" in name else 0.4
        tensors[name] = ((1 + x) if "norm" in name else x * scale).to(hf_dtype(name))
    save_file(tensors, folder / "model.safetensors")
    return folder


def samples(router: Router | None) -> list[tuple[Request, Generation]]:
    """Drawn prompts, answers and, for ``router``, experts: others than the model would choose."""
    rng = np.random.default_rng(0)
    pairs = []
    for index, (prompt, answer) in enumerate(LENGTHS):
        ids = rng.integers(0, VOCABULARY, prompt + answer).tolist()
        zeros = np.zeros(answer, np.float32)
        # a filter that keeps every token, so that drawn ones stay possible: half of the sequences are scored with one
        request = Request(tuple(ids[:prompt]), SamplingParams(temperature=0.8, top_k=VOCABULARY * (index % 4 > 1)))
        record = None
        if router is not None:
            drawn = np.random.default_rng(1).random((prompt + answer - 1, router.sparse_layers, router.experts))
            record = drawn.argsort(-1)[..., : router.top_k].astype(record_dtype(router))
        pairs.append((request, Generation(tuple(ids[prompt:]), zeros, zeros, "length", "0", routed_experts=record)))
    return pairs


@dataclass
class Outcome:
    """What one rank got: log-probabilities by sequence, per chunk what it holds and the gradients of that, the
    gradients' norm, and the tokens of its micro-batches that the router would have sent to other experts."""

    logprobs: dict[int, torch.Tensor]
    gradients: list[tuple[Held, dict[str, torch.Tensor]]]
    norm: float
    differing: int


def train(folder: Path, case: Case, device: str) -> Outcome:
    """Scores the case's sequences and takes one step on them, at learning rate 0 and without clipping."""
    policy = MegatronPolicy(
        folder,
        optimizer=OptimizerSettings(learning_rate=0.0, clip_grad=1e30),
        layout=case.layout,
        recompute=case.recompute,
        replay="check" if case.replayed else "off",
        threads=1,
        device=device,
    )
    moe = policy.config.moe
    pairs = samples(moe.router if moe is not None and case.replayed else None)
    copies = parallel_state.get_data_parallel_world_size()
    batches = list(case.batches)
    if case.dealt:
        batches = batches[parallel_state.get_data_parallel_rank() :: copies]
    if case.backwards:
        batches.reverse()
    scale = 1.0 if case.dealt else 1.0 / copies
    packed = [
        PackedBatch.pack(*zip(*[pairs[i] for i in batch], strict=True), order=batch[0]).padded(case.pad_to)
        for batch in batches
    ]
    scored = [policy.logprobs(batch).detach() for batch in packed]
    step = policy.train_step(packed, lambda logprobs, _: -logprobs.sum() * scale)
    for alone, trained in zip(scored, step.logprobs, strict=True):
        assert torch.equal(alone.view(torch.int32), trained.view(torch.int32)), "scoring differs from training"
    by_sequence: dict[int, torch.Tensor] = {}
    for batch, logprobs in zip(batches, scored, strict=True):
        parts = logprobs.cpu().split([LENGTHS[i][1] for i in batch])
        by_sequence |= dict(zip(batch, parts, strict=True))
    gradients = [
        (held, {name: p.main_grad.cpu().clone() for name, p in chunk.named_parameters()})
        for held, chunk in zip(policy.held, policy.chunks, strict=True)
    ]
    return Outcome(by_sequence, gradients, step.grad_norm, step.differing_tokens)


def compare(outcome: Outcome, reference: Outcome, every: Callable[[float], list[float]]) -> dict[str, Any]:
    """Numbers over all ranks: tokens compared and differing on this one summed, the largest relative difference of a
    weight's gradient and of the gradients' norm, and how many ranks counted otherwise routed tokens other than one."""
    tokens = mismatched = 0
    for index, logprobs in outcome.logprobs.items():
        tokens += logprobs.numel()
        equal = logprobs.view(torch.int32) == reference.logprobs[index].view(torch.int32)
        mismatched += int((~equal | ~logprobs.isfinite()).sum())
    worst = 0.0
    ((_, whole),) = reference.gradients
    for held, gradients in outcome.gradients:
        for name, mine in gradients.items():
            expected = take(whole[held[name][0].name], held[name])
            if not torch.equal(mine.view(torch.int32), expected.contiguous().view(torch.int32)):
                worst = max(worst, float((mine - expected).norm() / whole[held[name][0].name].norm()))
    norms = every(outcome.norm)
    assert len(set(norms)) == 1, f"ranks would clip by different norms: {norms}"
    return {
        "tokens": int(sum(every(tokens))),
        "mismatched_tokens": int(sum(every(mismatched))),
        "gradient": max(every(worst)),
        "norm": max(every(abs(outcome.norm / reference.norm - 1))),
        "differing_tokens": int(max(every(outcome.differing))),
    }


def main(rank: int, device: str, folder: Path, ranks: int, only: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120),
    )  # fmt: skip

    def every(value: float) -> list[float]:
        parts = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks)]
        dist.all_gather(parts, torch.tensor([value], dtype=torch.float64))
        return [float(part) for part in parts]

    folders = {name: make_model(folder / f"{name}-{rank}", raw) for name, raw in MODELS.items()}
    references: dict[tuple[str, bool], Outcome] = {}
    rows = []
    groups: Layout | None = None
    for case in cases():
        if (case.model, case.replayed) in references and only not in case.name:
            continue
        wanted = replace(case.layout, sequence_parallel=False, segments=case.layout.tensor)
        if groups not in (None, wanted):
            distributed.release()
        groups, began = wanted, time.perf_counter()
        outcome = train(folders[case.model], case, device)
        reference = references.setdefault((case.model, case.replayed), outcome)
        row = {"model": case.model, "layout": case.name, **compare(outcome, reference, every)}
        rows.append(row | {"control": case.control, "seconds": time.perf_counter() - began})
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    device, folder, ranks, only = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    start_processes(main, (device, folder, ranks, only), nprocs=ranks, start_method="fork")
