"""The sparse layer of Megatron's side: router, experts and combination by `zerokl.kernels`.

Megatron's own `MoELayer` dispatches through masks and probabilities, whose order of addition is its own. This layer
stands in its place in the layer spec, spreads experts over ranks, and adds weight gradients to Megatron's main ones.

Ranks that share a micro-batch each route their own part of its tokens, tensor-parallel ones without sequence
parallelism too: so no token is routed twice, and expert-parallel ranks may be tensor- or context-parallel ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from zerokl import kernels
from zerokl.alignment.megatron import dispatch, regions
from zerokl.alignment.megatron.core import (
    MLP,
    MegatronModule,
    MLPSubmodules,
    TransformerConfig,
    TransformerLayer,
    parallel_state,
)
from zerokl.alignment.megatron.model_config import MoeConfig
from zerokl.alignment.megatron.modules import PackedPositions
from zerokl.alignment.routing_replay import Replay


@dataclass(kw_only=True)
class MoeTransformerConfig(TransformerConfig):
    """TransformerConfig that carries the sparse layers' rules to the modules Megatron builds with it.

    Not Megatron's own fields: they cannot say all that a `Router` says, and switch on parts that are not used here.
    ``segments`` is R2's, of the down projections; ``shared_experts``: what their MLP is built of.
    """

    moe: MoeConfig
    segments: int
    shared_experts: MLPSubmodules


class Weight(torch.nn.Module):
    """A parameter with a name of its own, of one matrix or one per expert."""

    def __init__(self, config: TransformerConfig, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
        config.init_method(self.weight.data)


class RouterWeight(Weight):
    """The router's matrix [E, H], and the selection bias fp32 [E] where the model has one; whole on every rank."""

    expert_bias: torch.Tensor | None

    def __init__(self, config: MoeTransformerConfig) -> None:
        experts = config.moe.router.experts
        super().__init__(config, experts, config.hidden_size)
        # each tensor-parallel rank routes its own tokens, as under sequence parallelism: gradients add up over them
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]
        bias = torch.full((experts,), float("nan"), dtype=torch.float32) if config.moe.router.bias else None
        self.register_buffer("expert_bias", bias)


class Experts(torch.nn.Module):
    """SwiGLU experts, those of this rank: fc1 [E, 2 F, H] (gate rows, then up rows), fc2 [E, H, F]."""

    def __init__(self, config: MoeTransformerConfig) -> None:
        super().__init__()
        self.segments = config.segments
        ranks = parallel_state.get_expert_model_parallel_world_size()
        experts, ffn, hidden = config.moe.router.experts // ranks, config.moe.intermediate_size, config.hidden_size
        self.linear_fc1 = Weight(config, experts, 2 * ffn, hidden)
        self.linear_fc2 = Weight(config, experts, hidden, ffn)
        tokens_apart = config.tensor_model_parallel_size > 1
        for weight in self.parameters():
            # Megatron adds their gradients only over ranks with the same experts, and counts every rank's in the norm
            weight.allreduce = ranks == 1 and not tokens_apart  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """bf16 [R, H], rows grouped by expert at ``offsets`` [E + 1] -> the same shape."""
        h = kernels.silu_and_mul(kernels.grouped_linear(x, self.linear_fc1.weight, offsets))
        return kernels.grouped_linear(h, self.linear_fc2.weight, offsets, segments=self.segments)


class MoE(MegatronModule):
    """Routes every token to its experts and adds their outputs in slot order (contract R8)."""

    def __init__(self, config: MoeTransformerConfig, **_unused: Any) -> None:
        super().__init__(config=config)
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.expert_group = parallel_state.get_expert_model_parallel_group()
        self.rules = config.moe.router
        self.groups = kernels.Groups(self.rules.groups, self.rules.keep_groups)
        self.router = RouterWeight(config)
        self.experts = Experts(config)
        self.shared_experts = _shared(config, self.tensor_group) if config.moe.shared_size else None
        self.layer = -1
        self.replay: Replay | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's numbers start at 1."""
        self.layer = layer_number - 1

    def forward(self, hidden_states: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, None]:
        """bf16 [T, 1, H] -> the same shape, and no bias."""
        if padding_mask is not None:
            raise NotImplementedError("MoE: padding_mask is not supported; sequences are packed")
        parallel = self.config.sequence_parallel
        own = hidden_states if parallel else regions.split_tokens(hidden_states, self.tensor_group)
        x = own.flatten(0, 1)  # its gradient adds the router's and the rows' before the shared experts' joins
        routing = self.route(kernels.linear(x, self.router.weight, out_dtype=torch.float32))
        rows, permutation = kernels.moe_permute(x, routing.indices, self.rules.experts)
        y = self.compute(rows, permutation.offsets)
        combined = kernels.moe_combine(y, permutation, routing.weights, shared=self.shared(hidden_states)).view_as(own)
        return combined if parallel else regions.gather_tokens(combined, self.tensor_group), None

    def shared(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """bf16 [t, H]: what the shared experts, if any, make of the tokens that this rank routes."""
        if self.shared_experts is None:
            return None
        y = self.shared_experts(hidden_states)[0]
        return (y if self.config.sequence_parallel else regions.split_tokens(y, self.tensor_group)).flatten(0, 1)

    def compute(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """bf16 [R, H], rows grouped by all experts at ``offsets`` -> the same shape, whatever ranks hold them."""
        if self.expert_group.size() == 1:
            return self.experts(rows, offsets)
        route = dispatch.route(offsets, self.expert_group)
        mine = self.experts(dispatch.dispatch(rows, route, self.expert_group), route.offsets)
        return dispatch.collect(mine, route, self.expert_group)

    def route(self, logits: torch.Tensor) -> kernels.Routing:
        """The experts of every token: replayed where there is a replay, else chosen; weights by the live ``logits``."""
        if self.replay is None:
            return self.topk(logits)
        if self.replay.check:
            self.replay.compare(self.layer, self.topk(logits.detach()).indices)
        return self.topk(logits, self.replay.take(self.layer))

    def topk(self, logits: torch.Tensor, replay: torch.Tensor | None = None) -> kernels.Routing:
        """The model's own router on fp32 [T, E], or along the experts [T, top_k] of ``replay``."""
        rules = self.rules
        return kernels.router_topk(
            logits,
            rules.top_k,
            scoring=rules.scoring,
            groups=self.groups,
            bias=self.router.expert_bias,
            renormalize=rules.renormalize,
            scale=rules.scale,
            replay=replay,
        )


def _shared(config: MoeTransformerConfig, group: dist.ProcessGroup) -> MLP:
    """The SwiGLU that every token passes: a dense MLP of Megatron's in the width of all shared experts."""
    narrow = copy.copy(config)
    narrow.ffn_hidden_size = config.moe.shared_size
    return MLP(narrow, config.shared_experts, ffn_hidden_size=config.moe.shared_size, tp_group=group)


class MoELayer(TransformerLayer):
    """A decoder layer that tells its MoE which micro-batch runs.

    The micro-batch arrives with the call, so a recomputation in the backward replays its own records, whatever other
    micro-batches ran in between.
    """

    def forward(self, *args: Any, packed_seq_params: PackedPositions | None = None, **kwargs: Any) -> Any:
        self.mlp.replay = None if packed_seq_params is None else packed_seq_params.replay
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
