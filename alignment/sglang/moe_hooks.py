"""Binding SGLang's sparse layers: its model code calls a gate, a top-k and the experts, each computed here.

SGLang's block stays as it is, but for one with shared experts: it would round their sum twice. The gate's logits leave
unrounded (fp32), the top-k hands on expert indices and fp32 weights in slot order, and the experts are permuted,
multiplied and combined by the same ops as in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopKOutputChecker, capture_routed_experts_if_allowed
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod

from zerokl import kernels
from zerokl.alignment.sglang.errors import UnsupportedError

if TYPE_CHECKING:
    from zerokl.alignment.sglang.hooks import Hook
    from zerokl.alignment.sglang.ranks import Ranks


def bind_gate(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:  # noqa: ARG001
    """A replicated linear layer is supported as the gate of a sparse layer, and nowhere else."""
    if not name.endswith(".mlp.gate"):
        raise UnsupportedError(f"module {name}: a replicated linear layer is supported as a router's gate only")
    if type(module.quant_method) is not UnquantizedLinearMethod or module.weight.dtype is not torch.bfloat16:
        raise UnsupportedError(f"module {name}: quantized or non-bfloat16 weights are not supported")
    if module.bias is not None:
        raise UnsupportedError(f"module {name}: a gate with a bias on its logits is not supported")

    def forward(x: torch.Tensor) -> Any:
        hook.calls += 1
        return kernels.linear(x, module.weight, out_dtype=torch.float32), None

    hook.attach(module, "forward", forward)


def bind_topk(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:  # noqa: ARG001
    """The choice of experts. It also feeds SGLang's capture of routed experts, as SGLang's own top-k does."""
    config = module.topk_config
    options = _scoring(name, config)
    if config.custom_routing_function is not None or config.num_shared_topk_slots or module.enable_waterfill:
        raise UnsupportedError(f"module {name}: custom routing and slots for shared experts are not supported")

    def forward(hidden_states: torch.Tensor, router_logits: torch.Tensor, **named: Any) -> StandardTopKOutput:  # noqa: ARG001
        if any(value is not None for value in named.values()):
            raise UnsupportedError(f"module {name}: top-k arguments {sorted(named)} are not supported")
        hook.calls += 1
        routing = kernels.router_topk(router_logits, config.top_k, renormalize=config.renormalize, **options)
        capture_routed_experts_if_allowed(config, module.layer_id, routing.indices)
        return StandardTopKOutput(routing.weights, routing.indices, router_logits)

    hook.attach(module, "forward", forward)


def _scoring(name: str, config: Any) -> dict[str, Any]:
    """`router_topk`'s options for the two routers SGLang's models build: softmax, or sigmoid with bias and groups.

    SGLang says the second by a bias and groups alone; the scale it applies to the sum, the contract to the weights.
    """
    bias, scale = config.correction_bias, config.routed_scaling_factor
    if config.scoring_func == "softmax" and not config.use_grouped_topk and bias is None and scale in (None, 1.0):
        return {"scoring": "softmax"}
    if not config.use_grouped_topk or bias is None or bias.dtype is not torch.float32:
        raise UnsupportedError(
            f"module {name}: only softmax scores alone, or sigmoid scores with groups and an fp32 bias, are supported"
        )
    groups = kernels.Groups(config.num_expert_group, config.topk_group)
    return {"scoring": "sigmoid", "groups": groups, "bias": bias, "scale": 1.0 if scale is None else scale}


def bind_wide_gate(name: str, module: Any, ranks: Ranks, hook: Hook) -> None:  # noqa: ARG001
    """A gate that SGLang widens to fp32: narrowed to the checkpoint's bf16 again, which must lose nothing."""
    narrow = module.weight.detach().to(torch.bfloat16)
    if not torch.equal(narrow.float(), module.weight):
        raise UnsupportedError(f"module {name}: a gate whose weights are no bfloat16 numbers is not supported")
    module.weight = torch.nn.Parameter(narrow, requires_grad=False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        hook.calls += 1
        return kernels.linear(x, module.weight, out_dtype=torch.float32)

    hook.attach(module, "forward", forward)


def bind_block(name: str, module: Any, ranks: Ranks, combine: Hook) -> None:  # noqa: ARG001
    """A sparse block with shared experts. SGLang's would scale the routed sum and add the shared output, each rounded;
    here the weights are scaled (`bind_topk`) and the shared output joins the combination, which counts the call, before
    its one rounding."""
    if module.num_fused_shared_experts or not hasattr(module, "shared_experts"):
        raise UnsupportedError(f"module {name}: a block needs shared experts that are not fused into the routed ones")

    def forward(hidden_states: torch.Tensor, forward_batch: Any = None) -> torch.Tensor:  # noqa: ARG001
        topk_output = module.topk(hidden_states, module.gate(hidden_states))
        return module.experts(hidden_states, topk_output, shared=module.shared_experts(hidden_states))

    combine.attach(module, "forward", forward)


def bind_experts(name: str, module: Any, ranks: Ranks, permute: Hook, grouped: Hook, silu: Hook, combine: Hook) -> None:
    """w13_weight [E, 2 F, H] holds gate rows and then up rows of every expert, w2_weight [E, H, F] the way back; each
    rank has an equal part of the F. The experts' outputs are whole before they are combined."""
    _check_experts(name, module, ranks)

    def forward(
        hidden_states: torch.Tensor, topk_output: Any, pre_quant_input: Any = None, shared: torch.Tensor | None = None
    ) -> torch.Tensor:
        if pre_quant_input is not None or not TopKOutputChecker.format_is_standard(topk_output):
            raise UnsupportedError(f"module {name}: only plain inputs and a standard top-k are supported")
        permute.calls += 1
        rows, permutation = kernels.moe_permute(hidden_states, topk_output.topk_ids, module.num_experts)
        grouped.calls += 2
        silu.calls += 1
        h = kernels.silu_and_mul(kernels.grouped_linear(rows, module.w13_weight, permutation.offsets))
        y = ranks.grouped_row_linear(h, module.w2_weight, permutation.offsets)
        combine.calls += 1
        return kernels.moe_combine(y, permutation, topk_output.topk_weights, shared=shared)

    for hook in (permute, grouped, silu, combine):
        hook.attach(module, "forward", forward)


def _check_experts(name: str, module: Any, ranks: Ranks) -> None:
    config, method = module.moe_runner_config, module.quant_method
    plain = (
        type(method) is UnquantizedFusedMoEMethod
        and not method.use_triton_kernels
        and not method.w13_swiglu_interleaved
        and not method.with_bias
        and module.w13_weight.dtype is module.w2_weight.dtype is torch.bfloat16
        and config.activation == "silu"
        and config.is_gated
        and not config.apply_router_weight_on_input
        and not config.no_combine
        and (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit) == (None, None, None)
    )
    if not plain:
        raise UnsupportedError(f"module {name}: only unquantized bfloat16 SwiGLU experts are supported")
    if module.num_fused_shared_experts or (module.moe_tp_size, module.moe_ep_size) != (ranks.size, 1):
        raise UnsupportedError(f"module {name}: fused shared experts and experts spread over ranks are not supported")
