"""The architecture of a model, read from a Hugging Face ``config.json`` and checked to be one that is supported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerokl.alignment import architectures
from zerokl.alignment.architectures import Architecture
from zerokl.alignment.routing import Router, RoutingError, router_of


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the cause and the remedy."""


@dataclass(frozen=True)
class MoeConfig:
    """The sparse layers: their router, and the width of one expert."""

    router: Router
    intermediate_size: int

    @property
    def shared_size(self) -> int:
        """The width of all shared experts together; 0: there is none."""
        return self.router.shared_experts * self.intermediate_size


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a decoder. Names follow Hugging Face's ``config.json``; ``moe`` None: a dense model.

    rotary_dim: how many dimensions of a head turn, the first ones, by neighbours if ``interleaved_rotary``.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    rotary_dim: int
    interleaved_rotary: bool
    moe: MoeConfig | None = None

    def moe_at(self, layer: int) -> MoeConfig | None:
        """What layer ``layer`` (from 0) computes its experts by; None: it has a dense MLP."""
        return self.moe if self.moe is not None and layer >= self.moe.router.first_layer else None

    @staticmethod
    def load(model_dir: str | Path, plugin: Architecture | None = None) -> ModelConfig:
        """Read ``model_dir/config.json``; ``plugin``: an architecture besides those of the package.

        Raises ModelError for anything missing, malformed or unsupported.
        """
        path = Path(model_dir) / "config.json"
        if not path.is_file():
            raise ModelError(f"{path} does not exist: give the folder of a model in Hugging Face form")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON ({error}): download the model again") from error
        if not isinstance(raw, dict):
            raise ModelError(f"{path} holds no JSON object: download the model again")
        return _parse(raw, path, plugin)


def _parse(raw: dict[str, Any], path: Path, plugin: Architecture | None) -> ModelConfig:
    names = raw.get("architectures") or ["(none)"]
    architecture = architectures.find(names[0], plugin) if len(names) == 1 else None
    if architecture is None:
        raise ModelError(
            f"{path}: architecture {', '.join(names)} is not supported; supported are {architectures.supported(plugin)}"
        )
    _refuse_unsupported(raw, architecture, path)
    heads, hidden = _size(raw, "num_attention_heads", path), _size(raw, "hidden_size", path)
    raw = {"num_key_value_heads": heads, "head_dim": hidden // heads} | {k: v for k, v in raw.items() if v is not None}
    head_dim = _size(raw, "head_dim", path)
    config = ModelConfig(
        architecture=names[0],
        vocab_size=_size(raw, "vocab_size", path),
        hidden_size=hidden,
        intermediate_size=_size(raw, "intermediate_size", path),
        num_hidden_layers=_size(raw, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_size(raw, "num_key_value_heads", path),
        head_dim=head_dim,
        max_position_embeddings=_size(raw, "max_position_embeddings", path),
        rms_norm_eps=_positive(raw.get("rms_norm_eps"), "rms_norm_eps", path),
        rope_theta=_positive(_rope(raw, path), "rope_theta", path),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=architecture.has_head_norm(raw),
        qkv_bias=architecture.has_qkv_bias(raw),
        rotary_dim=_rotary_dim(architecture.rotated_fraction(raw), head_dim, path),
        interleaved_rotary=architecture.interleaved_rotary,
        moe=_moe(raw, path),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ModelError(
            f"{path}: {config.num_attention_heads} query heads do not divide into "
            f"{config.num_key_value_heads} key-value heads; correct num_key_value_heads"
        )
    return config


def _moe(raw: dict[str, Any], path: Path) -> MoeConfig | None:
    try:
        router = router_of(raw)
    except RoutingError as error:
        raise ModelError(f"{path}: {error}; use another model") from error
    return None if router is None else MoeConfig(router, _size(raw, "moe_intermediate_size", path))


def _refuse_unsupported(raw: dict[str, Any], architecture: Architecture, path: Path) -> None:
    wanted = {"hidden_act": "silu", "use_sliding_window": False, "quantization_config": None}
    for key, value in wanted.items():
        if raw.get(key, value) not in (value, None):
            raise ModelError(f"{path}: {key} = {raw[key]!r} is not supported, only {value!r}; use another model")
    if unmet := architecture.unmet(raw):
        raise ModelError(f"{path}: {'; '.join(unmet)}; use another model")
    layers = set(raw.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise ModelError(f"{path}: layer_types {sorted(layers)} are not supported, only 'full_attention'")


def _rope(raw: dict[str, Any], path: Path) -> Any:
    """The rotary base: ``rope_parameters`` since transformers 5, ``rope_theta`` and ``rope_scaling`` before."""
    parameters = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    for kind in (parameters.get("rope_type"), parameters.get("type")):
        if kind not in (None, "default"):
            raise ModelError(f"{path}: rotary scaling {kind!r} is not supported, only 'default'; use another model")
    return parameters.get("rope_theta", raw.get("rope_theta", 10000.0))


def _rotary_dim(fraction: Any, head_dim: int, path: Path) -> int:
    turned = _positive(fraction, "partial_rotary_factor", path) * head_dim
    if turned > head_dim or turned % 2:
        raise ModelError(
            f"{path}: partial_rotary_factor = {fraction} turns {turned:g} of {head_dim} dimensions of a head; "
            "supported is an even number of them"
        )
    return int(turned)


def _size(raw: dict[str, Any], key: str, path: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{path}: {key} must be a positive integer, got {value!r}; download the model again")
    return value


def _positive(value: Any, key: str, path: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"{path}: {key} must be a positive number, got {value!r}; download the model again")
    return float(value)
