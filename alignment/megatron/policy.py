"""`MegatronPolicy`: one model in Megatron-Core that scores packed batches and trains on them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file

from zerokl.alignment.architectures import Architecture
from zerokl.alignment.megatron import checkpoint, convert_moe, distributed, schedule
from zerokl.alignment.megatron.convert import check_tensors, hf_blocks, hf_to_megatron, megatron_to_hf, read_hf_weights
from zerokl.alignment.megatron.core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    __version__,
    clip_grad_by_total_norm_fp32,
)
from zerokl.alignment.megatron.layout import Layout, LayoutError
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.alignment.megatron.optimizer import OptimizerSettings, build_optimizer
from zerokl.alignment.megatron.sharding import shard
from zerokl.alignment.megatron.spec import build_model, build_stock_model
from zerokl.alignment.megatron.stock import StockModel
from zerokl.alignment.routing_replay import Mode, Replay
from zerokl.alignment.types import LossFunction, PackedBatch

# What an exported folder takes over from the source folder, besides the weights.
_MODEL_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the summed loss, the gradient norm before clipping, and per microbatch the log-probabilities
    (fp32 [n], detached) that this very forward computed, before the update; ``differing_tokens``: see MegatronPolicy.
    """

    loss: float
    grad_norm: float
    logprobs: list[torch.Tensor]
    differing_tokens: int = 0


class MegatronPolicy:
    """A Hugging Face model in Megatron-Core.

    ``architecture``: the model's, where the package does not know it. ``optimizer`` None gives a policy that scores
    only. ``stock`` runs Megatron's own layers instead of `zerokl.kernels`, for control measurements. ``recompute``
    trades time for activation memory, with the same bits.
    ``replay`` other than off makes the sparse layers follow the batches' routing records; with `check`, the tokens that
    they would have routed otherwise (in any layer) add up in ``differing_tokens``.
    ``device``: where it runs, `cpu` or `cuda`. ``layout`` spreads it over the ranks of torch.distributed: each takes
    its own micro-batches, as many as every other, and ranks that hold parts of one copy the same ones. Gradients add up
    over all ranks; so the loss of a step is the sum over data-parallel ranks. Megatron keeps global state: one policy
    per process at a time. Raises ModelError for a model, or a layout of it, that cannot be used.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        architecture: Architecture | None = None,
        optimizer: OptimizerSettings | None = None,
        stock: bool = False,
        recompute: bool = False,
        replay: Mode = "off",
        threads: int | None = None,
        layout: Layout | None = None,
        device: str = "cpu",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.model_dir = Path(model_dir)
        self.config = ModelConfig.load(model_dir, architecture)
        self.settings = optimizer
        self.step = 0
        self.stock = stock
        self.recompute = recompute
        self.replay = replay
        self.differing_tokens = 0
        _check_replay(self.config, replay, stock=stock, recompute=recompute)
        self.layout = layout or Layout()
        weights = hf_to_megatron(self.config, read_hf_weights(model_dir, self.config))
        distributed.initialise(self.layout)
        # this rank's parts of the model, in order of depth: one, unless a stage holds virtual stages
        self.chunks: list[Any]
        if stock:
            self.chunks = [build_stock_model(self.config, self.layout, recompute=recompute)]
        else:
            self.chunks = build_model(self.config, self.layout, recompute=recompute)
        self.device = torch.device(device)
        loaded = convert_moe.separate_experts(weights) if stock else weights
        for chunk in self.chunks:
            chunk.to(self.device)
            state = shard(loaded, chunk)
            _copy_into(dict(chunk.named_parameters()) | _biases(chunk), state)
        self._scorers: list[Any] = [StockModel(chunk) for chunk in self.chunks] if stock else self.chunks
        self._ddps: list[Any] = []
        self._optimizer: Any = None
        if optimizer is not None:
            # ours add weight gradients to main_grad themselves, so the tied embedding needs no zeroed dummy gradient
            if not stock:
                for chunk in self.chunks:
                    for parameter in chunk.parameters():
                        parameter.zero_out_wgrad = False
            ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
            self._ddps = [
                DistributedDataParallel(chunk.config, ddp_config, scorer)
                for chunk, scorer in zip(self.chunks, self._scorers, strict=True)
            ]
            self._optimizer = build_optimizer(optimizer, self._ddps)

    @property
    def model(self) -> Any:
        """The whole model. Raises LayoutError where this rank holds only parts of it."""
        if self.layout.shards_weights:
            raise LayoutError(f"this needs the whole model on one rank, it is laid out as {self.layout}")
        return self.chunks[0]

    @property
    def _weights(self) -> dict[str, torch.Tensor]:
        """Parameters by Megatron's names, and what is not trained but belongs to the model."""
        return dict(self.model.named_parameters()) | _biases(self.model)

    # -- scoring and training -------------------------------------------------------------------------------------

    def logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """fp32 [n]: the log-probability of every target, by the training forward, with gradients on.

        With pipeline stages, without gradients: they never meet on one rank.
        """
        batch = self._checked(batch)
        if self.layout.pipeline > 1:
            return schedule.run(self._scorers, [batch], None)[0]
        replay = self._replay(batch)
        if replay is None:
            return self._scorers[0](batch)
        logprobs = self._scorers[0](batch, replay)
        replay.finish(1)
        self.differing_tokens += replay.differing_tokens
        return logprobs

    def train_step(self, microbatches: Sequence[PackedBatch], loss_fn: LossFunction) -> StepResult:
        """One optimizer step on the sum of ``loss_fn(logprobs, index)`` over the microbatches.

        Raises FloatingPointError, with all weights as before, if a loss or the gradient norm is NaN or infinite.
        """
        optimizer = self._trained()
        if not microbatches:
            raise ValueError("train_step got no microbatches: there is nothing to train on")
        batches = [self._checked(batch) for batch in microbatches]
        for ddp in self._ddps:
            ddp.zero_grad_buffer()
        optimizer.zero_grad()
        total, differing = 0.0, 0

        def checked_loss(logprobs: torch.Tensor, index: int) -> torch.Tensor:
            nonlocal total
            loss = loss_fn(logprobs, index)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss of microbatch {index} is {value}; weights are unchanged. Drop the sample that causes it"
                )
            total += value
            return loss

        if self.layout.pipeline > 1:
            scored = schedule.run(self._ddps, batches, checked_loss)
        else:
            scored = []
            for index, batch in enumerate(batches):
                logprobs, differs = self._forward_backward(batch, index, checked_loss)
                scored.append(logprobs)
                differing += differs
        distributed.reduce_gradients(self._ddps)
        grad_norm = self._update(optimizer)
        self.step += 1
        self.differing_tokens += differing
        return StepResult(distributed.from_last_stage(total), grad_norm, scored, differing)

    def _forward_backward(self, batch: PackedBatch, index: int, loss_fn: LossFunction) -> tuple[torch.Tensor, int]:
        """One micro-batch: its log-probabilities, detached, and how many tokens its replay routed otherwise."""
        replay, ddp = self._replay(batch), self._ddps[0]
        logprobs = ddp(batch) if replay is None else ddp(batch, replay)
        loss_fn(logprobs, index).backward()
        if replay is None:
            return logprobs.detach(), 0
        replay.finish(2 if self.recompute else 1)
        return logprobs.detach(), replay.differing_tokens

    def _update(self, optimizer: Any) -> float:
        """Megatron's optimizer step, stopped before the update if the gradient norm is not finite."""
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm}; weights are unchanged. Lower the learning rate or drop the sample"
            )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grad_by_total_norm_fp32(parameters, self._settings().clip_grad, norm)
        optimizer.step_with_ready_grads()
        return norm

    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of the following steps; schedules are the caller's. Raises ValueError if negative or not finite."""
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise ValueError(f"learning_rate must be finite and at least 0, got {learning_rate}")
        for group in self._trained().param_groups:
            group["lr"] = learning_rate

    # -- weights --------------------------------------------------------------------------------------------------

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, bf16 tensor) pairs; views where the layout allows, valid until the next step."""
        state = {name: p.detach() for name, p in self._weights.items()}
        return megatron_to_hf(self.config, convert_moe.stack_experts(state) if self.stock else state)

    def weight_blocks(self) -> tuple[dict[str, torch.Tensor], dict[str, tuple[torch.Tensor, ...]]]:
        """Where the weights lie: the live parameters by Megatron's names, and for every Hugging Face tensor the views
        into them that make it up, by rows. The same memory for the policy's life. Not for stock layers."""
        state = {name: p.detach() for name, p in self._weights.items()}
        return state, dict(hf_blocks(self.config, state))

    def weights_digest(self) -> dict[str, str]:
        """Hugging Face name -> xxh3_128 of the tensor's contiguous bytes, in hexadecimal."""
        return {name: _digest(tensor) for name, tensor in self.named_weights()}

    def export_hf(self, target: str | Path) -> None:
        """Write a Hugging Face model folder: current weights, and config and tokenizer files of the source model."""
        with checkpoint.atomic_folder(target) as folder:
            for path in self.model_dir.iterdir():
                if path.name in _MODEL_FILES:
                    shutil.copyfile(path, folder / path.name)
            weights = {name: tensor.contiguous() for name, tensor in self.named_weights()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, target: str | Path) -> None:
        """Write everything that the next step depends on; a run that loads it continues bit for bit."""
        state = self._optimizer_state()
        metadata = {"step": self.step, "model": asdict(self.config), "optimizer": asdict(self._settings())}
        model = {name: p.detach() for name, p in self._weights.items()}
        checkpoint.save(target, {"model": model, "optimizer": state}, metadata)

    def load(self, source: str | Path) -> None:
        """Continue from `save`. Raises CheckpointError for a torn checkpoint or one of another model; then nothing
        has changed. Learning rate and the other settings stay as this policy was built."""
        state = self._optimizer_state()
        files, metadata = checkpoint.load(source)
        if metadata["model"] != asdict(self.config):
            raise checkpoint.CheckpointError(
                f"{source} holds another model ({metadata['model']}): start from the model it was made with"
            )
        targets = {"model": self._weights, "optimizer": state}
        for stem, tensors in targets.items():
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
            check_tensors(files.get(stem, {}), shapes, dtypes.__getitem__, f"{source}/{stem}.safetensors")
        for stem, tensors in targets.items():
            _copy_into(tensors, files[stem])
        self.step = int(metadata["step"])
        for group in self._trained().param_groups:
            group["step"] = self.step

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        """The live fp32 tensors: main parameters and both moments (made zero if no step has been taken)."""
        model, moments = self.model, self._trained().optimizer.state
        state: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            main = parameter.main_param
            if not moments[main]:
                moments[main] = {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
            state[f"main.{name}"] = main.detach()
            state |= {f"{key}.{name}": tensor for key, tensor in moments[main].items()}
        return state

    # -- the rest -------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """What ran: engine, version, layer implementation, model, threads."""
        return {
            "engine": "megatron-core",
            "version": __version__,
            "layers": "stock" if self.stock else "zerokl.kernels",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "model": asdict(self.config),
            "routing_replay": self.replay,
            "layout": asdict(self.layout),
        }

    def _trained(self) -> Any:
        if self._optimizer is None:
            raise RuntimeError("this policy only scores: build it with optimizer=OptimizerSettings(...) to train")
        return self._optimizer

    def _settings(self) -> OptimizerSettings:
        self._trained()
        assert self.settings is not None
        return self.settings

    def _replay(self, batch: PackedBatch) -> Replay | None:
        if self.replay == "off" or self.config.moe is None:
            return None
        router, tokens = self.config.moe.router, batch.tokens.numel()
        return Replay(batch.routed_experts, router, tokens, check=self.replay == "check")

    def _checked(self, batch: PackedBatch) -> PackedBatch:
        """The batch, padded as the layout needs it.

        Refuses what no kernel would notice: nothing to score, or a sequence beyond the rotary table.
        """
        if batch.rows.numel() == 0:
            raise ValueError("the batch has no scored rows: every sequence needs at least one generated token")
        longest = int(batch.cu_seqlens.diff().max())
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"a sequence of {longest} tokens exceeds the model's {self.config.max_position_embeddings}: "
                "shorten the prompt or max_new_tokens"
            )
        return batch.padded(self.layout.token_multiple).to(self.device)


def _biases(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is not trained but belongs to the model: the routers' selection biases."""
    return {name: buffer for name, buffer in chunk.named_buffers() if name.endswith(".expert_bias")}


def _check_replay(config: ModelConfig, replay: Mode, *, stock: bool, recompute: bool) -> None:
    if replay == "off":
        return
    if config.moe is None:
        raise ModelError(f"routing replay {replay!r}: {config.architecture} is dense, it routes nothing; set it to off")
    if stock and recompute:
        # a recomputing layer of Megatron's does not know whose micro-batch it recomputes
        raise ModelError("stock layers replay routing without recomputation only; set recompute to false")


def _copy_into(targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    """Copy every tensor by name; the two must hold the same names."""
    if targets.keys() != sources.keys():
        raise RuntimeError(f"parameter names differ: {sorted(targets.keys() ^ sources.keys())[:8]}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])


def _digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128(tensor.contiguous().view(torch.uint8).cpu().numpy().data).hexdigest()
