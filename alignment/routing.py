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
    weights last; bias: a selection bias per expert; groups of which keep_groups stay (1 of 1: no limit).
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

    @property
    def sparse_layers(self) -> int:
        """How many layers route: the second dimension of a routing record."""
        return self.layers - self.first_layer


def router_of(config: dict[str, Any]) -> Router | None:
    """The router a ``config.json`` describes; None for a dense model. Raises RoutingError for an unsupported one."""
    (architecture,) = config.get("architectures") or ("",)
    if architecture != "Qwen3MoeForCausalLM":
        return None
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise RoutingError("mlp_only_layers and decoder_sparse_step are not supported: every layer must be sparse")
    router = Router(
        # transformers 5 writes the second name
        experts=_size(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=_size(config, "num_experts_per_tok"),
        first_layer=0,
        layers=_size(config, "num_hidden_layers"),
        # what SGLang's model code and the model card take where the key is missing
        renormalize=bool(config.get("norm_topk_prob", True)),
    )
    return _checked(router)


def _checked(router: Router) -> Router:
    if router.top_k > router.experts:
        raise RoutingError(f"{router.top_k} experts per token of {router.experts}: num_experts_per_tok is too large")
    return router


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RoutingError(f"{key} must be a positive integer, got {value!r}")
    return value
