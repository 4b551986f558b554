"""The sizes of a model that decide its tensors, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerokl.weightsync.layout import LayoutError, Tensor

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

# architecture -> (bias of q, k and v; norm of query and key heads; mixture of experts)
ARCHITECTURES = {
    "LlamaForCausalLM": (False, False, False),
    "Qwen2ForCausalLM": (True, False, False),
    "Qwen3ForCausalLM": (False, True, False),
    "Qwen3MoeForCausalLM": (False, True, True),
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder; ``experts`` 0 is a dense one, and ``ffn`` the width of one expert otherwise."""

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

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its Hugging Face name, in the order of the model. A tied head is the embedding."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            shapes |= {f"{layer(index)}{name}": shape for name, shape in self._layer().items()}
        shapes[FINAL_NORM] = (self.hidden,)
        if not self.tied:
            shapes[HEAD] = (self.vocabulary, self.hidden)
        return {name: Tensor(name, shape, self.dtype) for name, shape in shapes.items()}

    def _layer(self) -> dict[str, tuple[int, ...]]:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        for part, rows in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"self_attn.{part}_proj.weight"] = (rows, self.hidden)
            if self.qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (rows,)
        shapes["self_attn.o_proj.weight"] = (self.hidden, query)
        for name in ("q_norm", "k_norm") if self.qk_norm else ():
            shapes[f"self_attn.{name}.weight"] = (self.head_dim,)
        if self.experts:
            shapes["mlp.gate.weight"] = (self.experts, self.hidden)
        for mlp in [f"mlp.experts.{e}." for e in range(self.experts)] or ["mlp."]:
            shapes[f"{mlp}gate_proj.weight"] = shapes[f"{mlp}up_proj.weight"] = (self.ffn, self.hidden)
            shapes[f"{mlp}down_proj.weight"] = (self.hidden, self.ffn)
        shapes["input_layernorm.weight"] = shapes["post_attention_layernorm.weight"] = (self.hidden,)
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
        return _shape(raw, *ARCHITECTURES[names[0]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayoutError(f"{path} is not a usable model configuration: {type(error).__name__}: {error}") from error


def _shape(raw: dict[str, Any], qkv_bias: bool, qk_norm: bool, moe: bool) -> ModelShape:
    if raw.get("quantization_config") or raw.get("attention_bias") or raw.get("mlp_bias"):
        raise ValueError("quantised weights and other biases than Qwen2's are not supported")
    if moe and (raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers")):
        raise ValueError("a mixture of dense and expert layers is not supported")
    heads = raw["num_attention_heads"]
    sizes = {
        "vocabulary": raw["vocab_size"],
        "hidden": raw["hidden_size"],
        "ffn": raw["moe_intermediate_size"] if moe else raw["intermediate_size"],
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
    }
    experts = raw["num_experts"] if moe else 0
    for name, value in (sizes | ({"experts": experts} if moe else {})).items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    tied = bool(raw.get("tie_word_embeddings", False))
    return ModelShape(**sizes, tied=tied, qkv_bias=qkv_bias, qk_norm=qk_norm, experts=experts)
