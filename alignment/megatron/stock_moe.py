"""Megatron's own sparse layers, for the control: how a model's router is said to them, and routing replay in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zerokl.alignment.megatron.core import TopKRouter
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.alignment.routing import Router
from zerokl.alignment.routing_replay import Replay

TopK = Callable[[torch.Tensor, int, int | None, int | None], tuple[torch.Tensor, torch.Tensor]]


def moe_options(model: ModelConfig) -> dict[str, Any]:
    """The fields of a TransformerConfig that make Megatron's own sparse layers those of ``model``; none if it is dense.

    The router computes in fp32, as Megatron recommends; its default, bf16, would make the control look worse than it
    is. Raises ModelError for a router that Megatron's own cannot express.
    """
    if model.moe is None:
        return {}
    rules = model.moe.router
    _check_expressible(rules)
    grouped = rules.groups > 1
    return {
        "num_moe_experts": rules.experts,
        "moe_router_topk": rules.top_k,
        "moe_ffn_hidden_size": model.moe.intermediate_size,
        "moe_layer_freq": [int(model.moe_at(layer) is not None) for layer in range(model.num_hidden_layers)],
        "moe_shared_expert_intermediate_size": model.moe.shared_size or None,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_router_score_function": rules.scoring,
        # a softmax over the chosen logits is one over all of them, renormalised
        "moe_router_pre_softmax": rules.scoring == "softmax" and not rules.renormalize,
        "moe_router_topk_scaling_factor": None if rules.scale == 1 else rules.scale,
        "moe_router_enable_expert_bias": rules.bias,
        "moe_router_num_groups": rules.groups if grouped else None,
        "moe_router_group_topk": rules.keep_groups if grouped else None,
    }


def _check_expressible(rules: Router) -> None:
    problems = {
        "one expert a token": rules.top_k == 1,
        "sigmoid scores without renormalisation": rules.scoring == "sigmoid" and not rules.renormalize,
        # Megatron judges a group by its best top_k / keep_groups experts, the contract (R8) by its best two
        "groups that keep other than two experts each": rules.groups > 1 and rules.top_k != 2 * rules.keep_groups,
    }
    found = [text for text, wrong in problems.items() if wrong]
    if found:
        raise ModelError(f"stock layers: Megatron's own router has no {', '.join(found)}; run with zerokl's kernels")


class StockReplay:
    """Stands where a router of Megatron's has its `RouterReplay`, and follows the routing records of a micro-batch.

    Megatron's own puts itself into a list of the whole process, which outlives the model, and counts nothing; this one
    hands on to `Replay`, so that every record is consumed as often as expected or the step fails.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._replay: Replay | None = None
        self._rows = torch.empty(0, dtype=torch.int64)

    def follow(self, replay: Replay | None, rows: torch.Tensor) -> None:
        """From now on take the experts from ``replay`` (None: choose), whose tokens are ``rows`` of the router's."""
        self._replay, self._rows = replay, rows

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's hook: scores [T, E] -> the scores and the indices, [T, topk], of the experts to go to.

        Padding, which no record knows, keeps its live choice.
        """
        values, chosen = default_compute_topk(scores, topk, num_groups, group_topk)
        if self._replay is None:
            return values, chosen
        if self._replay.check:
            self._replay.compare(self.layer, chosen[self._rows])
        experts = chosen.index_copy(0, self._rows, self._replay.take(self.layer))
        return scores.gather(1, experts), experts


def install_replay(model: torch.nn.Module) -> list[StockReplay]:
    """Give every router of ``model`` a `StockReplay`; they choose by themselves until told to follow."""
    replays = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            assert module.layer_number is not None  # its layer sets it, from 1 on
            module.router_replay = StockReplay(module.layer_number - 1)
            replays.append(module.router_replay)
    return replays
