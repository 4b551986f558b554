"""Wrong routers and combinations for `zerokl verify --inject`: each must show in the comparison with the rollout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from zerokl import kernels
from zerokl.alignment.megatron.moe import MoE

Topk = Callable[..., kernels.Routing]


def swap_slots(_layer: MoE, topk: Topk, logits: torch.Tensor, replay: torch.Tensor | None = None) -> kernels.Routing:
    """The first two experts get each other's weights."""
    weights, indices = topk(logits, replay)
    order = [1, 0, *range(2, weights.shape[1])]
    return kernels.Routing(weights[:, order], indices)


def reverse_slots(_layer: MoE, topk: Topk, logits: torch.Tensor, replay: torch.Tensor | None = None) -> kernels.Routing:
    """The right experts with the right weights, combined in the reverse order."""
    weights, indices = topk(logits, replay)
    return kernels.Routing(weights.flip(-1), indices.flip(-1))


def highest_of_equals(
    layer: MoE, topk: Topk, logits: torch.Tensor, replay: torch.Tensor | None = None
) -> kernels.Routing:
    """Among equal scores the highest index comes first: the choice with all experts numbered backwards."""
    if replay is None:
        bias = layer.router.expert_bias
        backwards = kernels.router_topk(
            logits.flip(-1),
            layer.rules.top_k,
            scoring=layer.rules.scoring,
            groups=layer.groups,
            bias=None if bias is None else bias.flip(-1),
        )
        replay = layer.rules.experts - 1 - backwards.indices
    return topk(logits, replay)


_FAULTS = {"routing-slots": swap_slots, "combine-order": reverse_slots, "tie-break": highest_of_equals}


def plant(model: torch.nn.Module, fault: str) -> None:
    """Replace the router of every sparse layer of ``model`` by the faulty one."""
    for layer in sparse_layers(model):
        layer.__dict__["topk"] = partial(_FAULTS[fault], layer, layer.topk)


def sparse_layers(model: torch.nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
