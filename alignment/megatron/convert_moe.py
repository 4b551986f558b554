"""The sparse layers' weights: Hugging Face names every expert's matrices, Megatron's side stacks them over experts.

``experts.linear_fc1`` [E, 2 F, H] holds each expert's gate rows and then its up rows, ``experts.linear_fc2`` [E, H, F]
its down projection. So a Hugging Face tensor is a view into the stacked one. Shared experts are one MLP with the same
layout; the router's selection bias is fp32 and a buffer, for no gradient reaches it. Megatron's own layers hold every
expert's matrices apart (`separate_experts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from zerokl.alignment.megatron.model_config import MoeConfig

BIAS = "gate.e_score_correction_bias"
_ROUTER, _M_ROUTER, _M_BIAS = "gate.weight", "router.weight", "router.expert_bias"
_M_FC1, _M_FC2 = "experts.linear_fc1.weight", "experts.linear_fc2.weight"
_M_SHARED_FC1, _M_SHARED_FC2 = "shared_experts.linear_fc1.weight", "shared_experts.linear_fc2.weight"
# where names of stacked experts and of experts apart differ
_STACKED, _LOCAL = ".mlp.experts.", ".mlp.experts.local_experts."


def hf_shapes(moe: MoeConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one sparse layer, by their names below ``mlp.``."""
    ffn = moe.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {_ROUTER: (moe.router.experts, hidden)}
    for expert in range(moe.router.experts):
        shapes |= dict.fromkeys((_name(expert, "gate"), _name(expert, "up")), (ffn, hidden))
        shapes[_name(expert, "down")] = (hidden, ffn)
    if moe.router.bias:
        shapes[BIAS] = (moe.router.experts,)
    if moe.shared_size:
        shapes |= dict.fromkeys((_shared("gate"), _shared("up")), (moe.shared_size, hidden))
        shapes[_shared("down")] = (hidden, moe.shared_size)
    return shapes


def to_megatron(moe: MoeConfig, source: str, target: str, hf: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One sparse layer's parameters below the prefix ``target`` from Hugging Face's below ``source``."""
    experts = range(moe.router.experts)

    def stacked(*parts: str) -> torch.Tensor:
        return torch.stack([torch.cat([hf[source + _name(e, part)] for part in parts]) for e in experts])

    state = {
        target + _M_ROUTER: hf[source + _ROUTER],
        target + _M_FC1: stacked("gate", "up"),
        target + _M_FC2: stacked("down"),
    }
    if moe.router.bias:
        state[target + _M_BIAS] = hf[source + BIAS]
    if moe.shared_size:
        state[target + _M_SHARED_FC1] = torch.cat([hf[source + _shared(part)] for part in ("gate", "up")])
        state[target + _M_SHARED_FC2] = hf[source + _shared("down")]
    return state


def to_hf(
    moe: MoeConfig, source: str, target: str, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The reverse, as views."""
    yield target + _ROUTER, state[source + _M_ROUTER]
    fc1, fc2 = state[source + _M_FC1], state[source + _M_FC2]
    for expert in range(moe.router.experts):
        gate, up = fc1[expert].chunk(2)
        yield target + _name(expert, "gate"), gate
        yield target + _name(expert, "up"), up
        yield target + _name(expert, "down"), fc2[expert]
    if moe.router.bias:
        yield target + BIAS, state[source + _M_BIAS]
    if moe.shared_size:
        gate, up = state[source + _M_SHARED_FC1].chunk(2)
        yield target + _shared("gate"), gate
        yield target + _shared("up"), up
        yield target + _shared("down"), state[source + _M_SHARED_FC2]


def separate_experts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as Megatron's own layers name it, ``experts.local_experts.{e}.linear_fc1.weight``, as views."""
    separate: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, found, matrix = name.partition(_STACKED)
        if found:
            separate |= {f"{layer}{_LOCAL}{expert}.{matrix}": weight for expert, weight in enumerate(tensor)}
        else:
            separate[name] = tensor
    return separate


def stack_experts(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `separate_experts`, as copies; the experts of a layer must come in their order."""
    stacked: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        layer, found, rest = name.partition(_LOCAL)
        if found:
            experts.setdefault(f"{layer}{_STACKED}{rest.partition('.')[2]}", []).append(tensor)
        else:
            stacked[name] = tensor
    return stacked | {name: torch.stack(parts) for name, parts in experts.items()}


def _name(expert: int, part: str) -> str:
    return f"experts.{expert}.{part}_proj.weight"


def _shared(part: str) -> str:
    return f"shared_experts.{part}_proj.weight"
