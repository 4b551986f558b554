"""Two ranks, forked from one process: `python checkpoint_ranks.py MODEL FOLDER`.

`exchange`: cuts the model for a layout of both processes, writes Megatron's distributed checkpoint, and reads it in
other layouts; what it got lies in FOLDER/LAYOUT-RANK.safetensors. `resume`: continues a run that one process saved.
`forget`: a layer that does not follow its routing records.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.multiprocessing import start_processes

from zerokl import kernels
from zerokl.alignment.megatron import distributed, sharded_checkpoint
from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.convert import read_hf_weights
from zerokl.alignment.megatron.layout import Layout, Place
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.moe import MoE
from zerokl.alignment.megatron.optimizer import OptimizerSettings
from zerokl.alignment.megatron.policy import MegatronPolicy
from zerokl.alignment.megatron.shard import shard
from zerokl.alignment.routing import RoutingError
from zerokl.alignment.routing_replay import Mode, record_dtype
from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams

# as in Megatron, the expert parallel ranks of the first layout are its tensor parallel ones
WRITTEN = (Layout(tensor=2, expert=2, segments=2), [Place(tensor=0, expert=0), Place(tensor=1, expert=1)])
READ = {
    "tensor": WRITTEN,
    "pipeline": (Layout(pipeline=2), [Place(stage=0), Place(stage=1)]),
    "experts": (Layout(expert=2), [Place(expert=0), Place(expert=1)]),
    "replicas": (Layout(), [Place(), Place()]),
}


def exchange(rank: int, model: Path, folder: Path) -> None:
    config = ModelConfig.load(model)
    layout, places = WRITTEN
    checkpoint = folder / "checkpoint"
    state = shard(config, read_hf_weights(model, config), layout, places[rank])
    sharded_checkpoint.save(checkpoint, config, layout, places, state)
    for name, (layout, places) in READ.items():
        loaded = sharded_checkpoint.load(checkpoint, config, layout, places)
        save_file(loaded, folder / f"{name}-{rank}.safetensors")
    try:
        sharded_checkpoint.load(checkpoint, ModelConfig(**(vars(config) | {"rope_theta": 2.0})), layout, places)
    except CheckpointError as error:
        (folder / f"error-{rank}").write_text(str(error))


def policy(model: Path, *, replay: Mode = "off", **layout: int) -> MegatronPolicy:
    # no clipping: the gradients' norm is equal over layouts only up to the order of its sum
    settings = OptimizerSettings(learning_rate=1e-3, weight_decay=0.01, clip_grad=1e30)
    return MegatronPolicy(model, optimizer=settings, threads=1, replay=replay, layout=Layout(segments=2, **layout))


def step(trained: MegatronPolicy, seed: int) -> None:
    """One optimizer step on two drawn micro-batches, with drawn routing records."""
    assert trained.config.moe is not None
    rng, router = np.random.default_rng(seed), trained.config.moe.router
    batches = []
    for prompt, answer in ((6, 9), (20, 15)):
        ids, zeros = rng.integers(0, 320, prompt + answer).tolist(), np.zeros(answer, np.float32)
        drawn = rng.random((prompt + answer - 1, router.sparse_layers, router.experts)).argsort(-1)
        record = drawn[..., : router.top_k].astype(record_dtype(router))
        generation = Generation(tuple(ids[prompt:]), zeros, zeros, "length", "0", routed_experts=record)
        batches.append(PackedBatch.pack([Request(tuple(ids[:prompt]), SamplingParams())], [generation]))
    trained.train_step(batches, lambda logprobs, _: -logprobs.mean())


def resume(rank: int, model: Path, folder: Path) -> None:
    first = policy(model, tensor=2, expert=2)
    first.load(folder / "one-1")
    (folder / f"digests-{rank}.json").write_text(json.dumps(first.weights_digest()))
    first.save(folder / "tensor-1")
    first.export_hf(folder / "exported")
    distributed.release()
    second = policy(model, pipeline=2)
    second.load(folder / "tensor-1")
    step(second, 2)
    second.save(folder / "pipeline-2")
    try:
        second.save(folder / "pipeline-2")
    except CheckpointError as error:
        (folder / f"exists-{rank}").write_text(str(error))


def forget(rank: int, model: Path, folder: Path) -> None:
    """A layer of the second stage does not take its records: the step fails on both ranks, and changes nothing."""
    distributed.release()
    trained = policy(model, replay="on", pipeline=2)
    digests, route = trained.weights_digest(), MoE.route

    def forgetful(layer: MoE, logits: torch.Tensor) -> kernels.Routing:
        layer.replay = None
        return route(layer, logits)

    try:
        with mock.patch.object(MoE, "route", forgetful):
            step(trained, 3)
    except RoutingError as error:
        (folder / f"forgot-{rank}").write_text(str(error))
    assert trained.weights_digest() == digests
    step(trained, 3)


def main(rank: int, model: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    exchange(rank, model, folder)
    resume(rank, model, folder)
    forget(rank, model, folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(main, (Path(sys.argv[1]), Path(sys.argv[2])), nprocs=2, start_method="fork")
