"""What a mixture-of-experts router of a Hugging Face model is: sizes and rules, read once for both engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


class RoutingError(ValueError):
    """A router that is not supported, or a routing record that does not fit its sample; the message names it."""


@dataclass(frozen=True)
class Router:
    """The router of every sparse layer (contract R8): all layers from ``first_layer`` on are sparse.

    scoring: `softmax` or `sigmoid`; renormalize: the chosen scores are divided by their sum; scale: multiplies the
    weights last; bias: there is a selection bias per expert; groups, of which keep_groups stay (1 of 1: no limit);
    shared_experts: dense experts, side by side in one MLP, that every token goes to besides.
    """

    experts: int
    top_k: int
    first_layer: int
    layers: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    keep_groups: int = 1
    shared_experts: int = 0

    @property
    def sparse_layers(self) -> int:
        """How many layers route: the second dimension of a routing record."""
        return self.layers - self.first_layer


def router_of(config: dict[str, Any]) -> Router | None:
    """The router a ``config.json`` describes; None for a dense model. Raises RoutingError for an unsupported one."""
    (architecture,) = config.get("architectures") or ("",)
    readers = {"Qwen3MoeForCausalLM": _qwen3_moe, "Glm4MoeForCausalLM": _glm4_moe}
    return _checked(readers[architecture](config)) if architecture in readers else None


def _qwen3_moe(config: dict[str, Any]) -> Router:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise RoutingError("mlp_only_layers and decoder_sparse_step are not supported: every layer must be sparse")
    return Router(
        # transformers 5 writes the second name
        experts=_size(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        first_layer=0,
        layers=_size(config, "num_hidden_layers"),
        renormalize=bool(config.get("norm_topk_prob", False)),  # False is transformers' default for this model
    )


def _glm4_moe(config: dict[str, Any]) -> Router:
    """Sigmoid scores, a selection bias, groups of experts (judged by their best two) and shared experts: the router of
    DeepSeek-V3 (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.1.2) and GLM-4.5."""
    scale = config.get("routed_scaling_factor", 1.0)
    if not isinstance(scale, int | float) or not scale > 0:
        raise RoutingError(f"routed_scaling_factor must be a positive number, got {scale!r}")
    return Router(
        experts=_size(config, "n_routed_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        first_layer=_size(config, "first_k_dense_replace", least=0),
        layers=_size(config, "num_hidden_layers"),
        scoring="sigmoid",
        renormalize=bool(config.get("norm_topk_prob", True)),
        scale=float(scale),
        bias=True,
        groups=_size(config, "n_group"),
        keep_groups=_size(config, "topk_group"),
        shared_experts=_size(config, "n_shared_experts"),
    )


def _checked(router: Router) -> Router:
    if router.top_k > router.experts:
        raise RoutingError(f"{router.top_k} experts per token of {router.experts}: num_experts_per_tok is too large")
    if router.first_layer >= router.layers:
        raise RoutingError(f"first_k_dense_replace = {router.first_layer} leaves no sparse layer of {router.layers}")
    if router.experts % router.groups or router.keep_groups > router.groups:
        raise RoutingError(f"{router.keep_groups} of {router.groups} groups of {router.experts} experts do not exist")
    return router


def _size(config: dict[str, Any], key: str, *, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RoutingError(f"{key} must be {'a positive' if least else 'an'} integer, got {value!r}")
    return value
