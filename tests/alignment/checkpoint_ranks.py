"""One of two processes: `python checkpoint_ranks.py RANK MODEL FOLDER`.

Cuts the model for a layout of both processes, writes Megatron's distributed checkpoint, and reads it in other layouts;
what it got lies in FOLDER/LAYOUT-RANK.safetensors.
"""

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from zerokl.alignment.megatron import sharded_checkpoint
from zerokl.alignment.megatron.checkpoint import CheckpointError
from zerokl.alignment.megatron.convert import read_hf_weights
from zerokl.alignment.megatron.model_config import ModelConfig
from zerokl.alignment.megatron.shard import Layout, Rank, shard

# as in Megatron, the expert parallel ranks of the first layout are its tensor parallel ones
WRITTEN = (Layout(tensor=2, expert=2), [Rank(tensor=0, expert=0), Rank(tensor=1, expert=1)])
READ = {
    "tensor": WRITTEN,
    "pipeline": (Layout(pipeline=2), [Rank(pipeline=0), Rank(pipeline=1)]),
    "experts": (Layout(expert=2), [Rank(expert=0), Rank(expert=1)]),
    "replicas": (Layout(), [Rank(), Rank()]),
}


def main(rank: int, model: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
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
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
