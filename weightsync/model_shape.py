"""The sizes of a model that decide its tensors, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zerokl.weightsync.layout import LayoutError, Tensor

CHOICE_BIAS = "mlp.gate.e_score_correction_bias"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class _Reading:
    """How the ``config.json`` of one architecture is read. A text names the key that says so (absent: no).

    experts: the names that their number goes by, none: it is dense; glm: a router with a selection bias, and besides
    the experts there are ``first_k_dense_replace`` dense layers and shared experts.
    """

    qkv_bias: bool | str = False
    qk_norm: bool | str = False
    experts: tuple[str, ...] = ()
    glm: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": _Reading(),
    "Qwen2ForCausalLM": _Reading(qkv_bias=True),
    "Qwen3ForCausalLM": _Reading(qk_norm=True),
    "Qwen3MoeForCausalLM": _Reading(qk_norm=True, experts=("num_experts", "num_local_experts")),  # of transformers 5
    "Glm4MoeForCausalLM": _Reading("attention_bias", "use_qk_norm", ("n_routed_experts",), glm=True),
}


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention (DeepSeek-AI, "DeepSeek-V2", 2024): queries, keys and values come from two
    narrow projections, of ``q_rank`` and ``kv_rank`` columns; a head has ``nope + rope`` and ``value`` dimensions."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder; ``experts`` 0 is a dense one, and ``ffn`` the width of one expert otherwise.

    Of a sparse one the first ``dense_layers`` may be dense, ``dense_ffn`` wide, and every other layer may have a shared
    expert, ``shared_ffn`` wide, and a bias for the choice of experts. With ``latent``, ``kv_heads`` and ``head_dim`` do
    not count.
    """

    vocabulary: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    dtype: str = "bfloat16"
    latent: Latent | None = None
    dense_layers: int = 0
    dense_ffn: int = 0
    shared_ffn: int = 0
    choice_bias: bool = False

    def sparse(self, index: int) -> bool:
        """Whether a layer has experts."""
        return self.experts > 0 and index >= self.dense_layers

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its Hugging Face name, in the order of the model. A tied head is the embedding."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            shapes |= {f"{layer(index)}{name}": shape for name, shape in self._layer(index).items()}
        shapes[FINAL_NORM] = (self.hidden,)
        if not self.tied:
            shapes[HEAD] = (self.vocabulary, self.hidden)
        dtypes = {name: "float32" if name.endswith(CHOICE_BIAS) else self.dtype for name in shapes}
        return {name: Tensor(name, shape, dtypes[name]) for name, shape in shapes.items()}

    def _layer(self, index: int) -> dict[str, tuple[int, ...]]:
        shapes = self._attention() if self.latent is None else self._latent_attention(self.latent)
        mlps = {"mlp.": self.dense_ffn or self.ffn}
        if self.sparse(index):
            shapes["mlp.gate.weight"] = (self.experts, self.hidden)
            if self.choice_bias:
                shapes[CHOICE_BIAS] = (self.experts,)
            mlps = {f"mlp.experts.{e}.": self.ffn for e in range(self.experts)}
            if self.shared_ffn:
                mlps["mlp.shared_experts."] = self.shared_ffn
        for mlp, width in mlps.items():
            shapes[f"{mlp}gate_proj.weight"] = shapes[f"{mlp}up_proj.weight"] = (width, self.hidden)
            shapes[f"{mlp}down_proj.weight"] = (self.hidden, width)
        shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (self.hidden,)
        return shapes

    def _latent_attention(self, sizes: Latent) -> dict[str, tuple[int, ...]]:
        return {
            "self_attn.q_a_proj.weight": (sizes.q_rank, self.hidden),
            "self_attn.q_a_layernorm.weight": (sizes.q_rank,),
            "self_attn.q_b_proj.weight": (self.heads * (sizes.nope + sizes.rope), sizes.q_rank),
            "self_attn.kv_a_proj_with_mqa.weight": (sizes.kv_rank + sizes.rope, self.hidden),
            "self_attn.kv_a_layernorm.weight": (sizes.kv_rank,),
            "self_attn.kv_b_proj.weight": (self.heads * (sizes.nope + sizes.value), sizes.kv_rank),
            "self_attn.o_proj.weight": (self.hidden, self.heads * sizes.value),
        }

    def _attention(self) -> dict[str, tuple[int, ...]]:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{part}_proj.weight"] = (rows, self.hidden)
            if self.qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (rows,)
        shapes["self_attn.o_proj.weight"] = (self.hidden, query)
        for name in ("q_norm", "k_norm") if self.qk_norm else ():
            shapes[f"self_attn.{name}.weight"] = (self.head_dim,)
        return shapes


def layer(index: int) -> str:
    """The prefix of one layer's Hugging Face names."""
    return f"model.layers.{index}."


def read_shape(model_dir: Path) -> ModelShape:
    """The shape of a model folder. Raises LayoutError naming the file and what is wrong or not supported in it."""
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_bytes())
        names = raw["architectures"]
        if len(names) != 1 or names[0] not in ARCHITECTURES:
            raise LayoutError(f"{path}: architecture {names} is not supported; supported are {list(ARCHITECTURES)}")
        return _shape(raw, ARCHITECTURES[names[0]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayoutError(f"{path} is not a usable model configuration: {type(error).__name__}: {error}") from error


def _shape(raw: dict[str, Any], reading: _Reading) -> ModelShape:
    bias = raw.get("attention_bias") and reading.qkv_bias != "attention_bias"
    if raw.get("quantization_config") or bias or raw.get("mlp_bias"):
        raise ValueError("quantised weights and other biases than those of query, key and value are not supported")
    if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
        raise ValueError("of dense and expert layers, dense ones can only come first (first_k_dense_replace)")
    heads = raw["num_attention_heads"]
    sizes = {
        "vocabulary": raw["vocab_size"],
        "hidden": raw["hidden_size"],
        "ffn": raw["moe_intermediate_size" if reading.experts else "intermediate_size"],
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
    }
    if reading.experts:
        sizes["experts"] = next((raw[name] for name in reading.experts if name in raw), None)
    _check_sizes(sizes, least=1)
    shape = ModelShape(
        **sizes,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=_flag(reading.qkv_bias, raw),
        qk_norm=_flag(reading.qk_norm, raw),
    )
    return _with_shared_experts(shape, raw) if reading.glm else shape


def _with_shared_experts(shape: ModelShape, raw: dict[str, Any]) -> ModelShape:
    """GLM-4.5's router and layers (DeepSeek-V3's), beside its experts."""
    dense, shared = raw["first_k_dense_replace"], raw["n_shared_experts"]
    _check_sizes({"first_k_dense_replace": dense, "n_shared_experts": shared}, least=0)
    _check_sizes({"intermediate_size": raw["intermediate_size"]}, least=1)
    if dense >= shape.layers:
        raise ValueError(f"first_k_dense_replace {dense} leaves no layer of {shape.layers} to the experts")
    return replace(
        shape, choice_bias=True, dense_layers=dense, dense_ffn=raw["intermediate_size"], shared_ffn=shared * shape.ffn
    )


def _check_sizes(sizes: dict[str, Any], *, least: int) -> None:
    for name, value in sizes.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _flag(value: bool | str, raw: dict[str, Any]) -> bool:
    return bool(raw.get(value, False)) if isinstance(value, str) else value
