"""The faults `zerokl verify --inject` plants, one at a time: whatever it is, the verification must end with exit 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from zerokl.alignment.routing_replay import Mode
from zerokl.orchestrate.errors import UserError

if TYPE_CHECKING:
    from zerokl.alignment.megatron.model_config import ModelConfig
    from zerokl.alignment.megatron.policy import MegatronPolicy
    from zerokl.alignment.sglang.engine import RolloutEngine
    from zerokl.alignment.types import Generation

Fault = Literal[
    "ulp", "nan", "weight-bit", "routing-slots", "tie-break", "combine-order", "stale-bias", "replay-shift"
]  # fmt: skip
_SPARSE = ("routing-slots", "tie-break", "combine-order", "stale-bias", "replay-shift")
_TIMEOUT_S = 300.0


def check(fault: Fault | None, config: ModelConfig, replay: Mode, *, stock: bool, ranks: int = 1) -> None:
    """Raise UserError for a fault that the model, or the run, has no place for."""
    if fault in _SPARSE and config.moe is None:
        raise UserError(f"--inject {fault}: {config.architecture} is dense", "use a mixture-of-experts model")
    if fault in _SPARSE and fault != "replay-shift" and stock:
        raise UserError(f"--inject {fault}: only zerokl's own router can be faulty", "leave out --control stock")
    if fault == "stale-bias" and not (config.moe and config.moe.router.bias):
        raise UserError(f"--inject stale-bias: {config.architecture} has no selection bias", "use another model")
    if fault == "tie-break" and ranks > 1:
        raise UserError("--inject tie-break: changes weights of an engine of one rank", "use one rank")
    if fault == "tie-break" and replay == "on":
        raise UserError("--inject tie-break: a replayed choice breaks no tie", "use --replay off or --replay check")
    if fault == "replay-shift" and replay == "off":
        raise UserError("--inject replay-shift: nothing is replayed", "add --replay on or --replay check")


def plant(
    fault: Fault | None, engine: RolloutEngine, policy: MegatronPolicy, sync: Callable[[], object] | None = None
) -> None:
    """Faults that are there before the first token is sampled; ``sync`` gives the engine the policy's weights."""
    if fault == "weight-bit":
        # the lowest mantissa bit of one element: the smallest fault a transfer could leave
        name, _, _ = min(engine.weights_digest(timeout_s=_TIMEOUT_S)).partition("@")
        engine.flip_weight_bit(name, 0, 0)
    if fault in ("routing-slots", "combine-order", "tie-break"):
        from zerokl.alignment.megatron import moe_faults

        if fault == "tie-break":
            assert sync is not None, "tie-break changes weights of both sides"
            _make_ties(policy)
            sync()
        moe_faults.plant(policy.model, fault)
    if fault == "stale-bias":
        for bias in _router_tensors(policy, "expert_bias"):
            bias.copy_(bias.roll(1))


def damage_records(fault: Fault | None, generations: list[Generation]) -> list[Generation]:
    """`replay-shift`: every token's experts stand at the token after it."""
    if fault != "replay-shift":
        return generations
    moved = []
    for generation in generations:
        assert generation.routed_experts is not None
        moved.append(dataclasses.replace(generation, routed_experts=np.roll(generation.routed_experts, 1, axis=0)))
    return moved


def damage_scores(fault: Fault | None, scored: list[np.ndarray]) -> None:
    """`ulp` and `nan`: change one log-probability in the middle, by one unit in the last place, or to NaN."""
    if fault not in ("ulp", "nan"):
        return
    where = len(scored) // 2
    values = scored[where].copy()
    values[-1] = np.nan if fault == "nan" else np.nextafter(values[-1], np.float32(-np.inf))
    scored[where] = values


def _make_ties(policy: MegatronPolicy) -> None:
    """Experts 0 and 1 get equal scores: real weights have no ties to break."""
    for tensor in (*_router_tensors(policy, "weight"), *_router_tensors(policy, "expert_bias")):
        tensor[1].copy_(tensor[0])


def _router_tensors(policy: MegatronPolicy, name: str) -> Sequence[Any]:
    """This tensor of every sparse layer's router, detached; none where the model has none."""
    from zerokl.alignment.megatron.moe_faults import sparse_layers

    found = [getattr(layer.router, name) for layer in sparse_layers(policy.model)]
    return [tensor.detach() for tensor in found if tensor is not None]
