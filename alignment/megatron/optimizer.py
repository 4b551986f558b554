"""Adam as Megatron's mixed-precision optimizer wants it, and the optimizer built around it.

torch's AdamW keeps a ``step`` tensor per parameter, which Megatron neither reshards nor restores right. Here ``step``
is one integer of the parameter group and a parameter's state is ``{exp_avg, exp_avg_sq}``, so a saved run resumes bit
for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from zerokl.alignment.megatron.core import OptimizerConfig, get_megatron_optimizer, optimizer_module


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with decoupled weight decay (none on one-dimensional weights) and clipping by the global gradient norm."""

    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        problems = [f"{name} must be finite" for name, x in vars(self).items() if not math.isfinite(x)]
        problems += [
            f"{name} must be at least 0" for name in ("learning_rate", "weight_decay") if getattr(self, name) < 0
        ]
        problems += [f"{name} must be above 0" for name in ("eps", "clip_grad") if getattr(self, name) <= 0]
        problems += [
            f"{name} must be at least 0 and below 1" for name in ("beta1", "beta2") if not 0 <= getattr(self, name) < 1
        ]
        if problems:
            raise ValueError(f"optimizer settings: {'; '.join(problems)}; got {self}")


class PortableAdam(torch.optim.Optimizer):
    """AdamW whose ``step`` lives in the parameter group; the constructor takes FusedAdam's arguments."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("PortableAdam decouples weight decay; set OptimizerConfig.decoupled_weight_decay=True")
        if capturable:
            raise ValueError("PortableAdam cannot be captured in a CUDA graph; set optimizer_cuda_graph=False")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("PortableAdam.step takes no closure")
        for group in self.param_groups:
            self._step_group(group)
            group["step"] += 1

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            # torch counts these up itself; made afresh each time from the group's integer
            [torch.tensor(float(group["step"]), device=p.device) for p in params],
            fused=True,  # one pass over memory, element by element: the same bits with any number of threads
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def build_optimizer(settings: OptimizerSettings, ddp_models: list[torch.nn.Module]) -> Any:
    """Megatron's optimizer: bf16 parameters, fp32 main parameters, `PortableAdam`, clipping by Megatron."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    with _megatron_uses_portable_adam():
        optimizer = get_megatron_optimizer(config, ddp_models)
    for group in optimizer.param_groups:
        # Megatron leaves this product to its learning-rate scheduler, which is not used here.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    return optimizer


def adam_state(optimizer: Any, chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The live fp32 tensors that belong to a chunk's parameters: ``main.``, ``exp_avg.`` and ``exp_avg_sq.`` before its
    name; moments are made (zero) if no step has been taken."""
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for inner in optimizer.chained_optimizers:
        for group in inner.param_groups:
            moments |= {held: inner.optimizer.state[held] for held in group["params"]}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in chunk.named_parameters():
        main: torch.Tensor = getattr(parameter, "main_param")  # noqa: B009  (Megatron's)
        if not moments[main]:
            moments[main] |= {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
        state[f"main.{name}"] = main.detach()
        state |= {f"{key}.{name}": tensor for key, tensor in moments[main].items()}
    return state


@contextmanager
def _megatron_uses_portable_adam() -> Iterator[None]:
    """The factory takes no optimizer class: it takes its module's ``Adam``, if that passes for a fused one."""
    saved = (optimizer_module.Adam, optimizer_module.USING_PYTORCH_OPTIMIZER)
    optimizer_module.Adam, optimizer_module.USING_PYTORCH_OPTIMIZER = PortableAdam, False
    try:
        yield
    finally:
        optimizer_module.Adam, optimizer_module.USING_PYTORCH_OPTIMIZER = saved
