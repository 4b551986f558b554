"""What sets one decoder architecture apart from another: plain data that both engines read.

All architectures are the same pre-norm decoder (RMSNorm, grouped-query attention with rotary positions, SwiGLU or
experts) and differ in the fields below. One that is not listed here is added from outside the package by an
`Architecture` of one's own (docs/architectures.md); being data, it crosses process boundaries as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A decoder architecture. ``name``: what ``architectures`` of ``config.json`` says, and SGLang's class.

    qkv_bias, head_norm: whether the query, key and value projections have a bias, and whether query and key heads are
    normalised; a text names the key of ``config.json`` that says so (absent: no).
    partial_rotary: None where whole heads turn; else the part of a head that turns if ``partial_rotary_factor`` does
    not say otherwise. interleaved_rotary: by pairs of neighbours (GPT-J) instead of halves (GPT-NeoX).
    required: keys of ``config.json`` and the only value supported; a missing key or null passes.
    sglang_module: the file below SGLang's ``models`` that defines the class, without its suffix.
    sglang_containers: module classes in it that compute nothing themselves on the path from token to log-probability:
    every other module must be one that the hooks bind.
    """

    name: str
    sglang_module: str
    sglang_containers: tuple[str, ...]
    qkv_bias: bool | str = False
    head_norm: bool | str = False
    partial_rotary: float | None = None
    interleaved_rotary: bool = False
    required: tuple[tuple[str, bool | int | float | str | None], ...] = ()

    def has_qkv_bias(self, config: Mapping[str, Any]) -> bool:
        return _flag(self.qkv_bias, config)

    def has_head_norm(self, config: Mapping[str, Any]) -> bool:
        return _flag(self.head_norm, config)

    def rotated_fraction(self, config: Mapping[str, Any]) -> Any:
        """``partial_rotary_factor``, or what stands for it; transformers 5 keeps it among the rotary parameters."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        found = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        whole = 1.0 if self.partial_rotary is None else self.partial_rotary
        return whole if found is None else found

    def unmet(self, config: Mapping[str, Any]) -> list[str]:
        """The requirements that ``config`` breaks, in words."""
        wrong = [(key, value) for key, value in self.required if config.get(key, value) not in (value, None)]
        problems = [f"{key} = {config[key]!r} is not supported, only {value!r}" for key, value in wrong]
        if self.partial_rotary is None and self.rotated_fraction(config) != 1.0:
            problems.append(f"partial_rotary_factor is not supported for {self.name}, which turns whole heads")
        return problems


def _flag(value: bool | str, config: Mapping[str, Any]) -> bool:
    return bool(config.get(value, False)) if isinstance(value, str) else value


_NO_BIAS = (("attention_bias", False), ("mlp_bias", False))

BUILT_IN = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "LlamaForCausalLM",
            "llama",
            ("LlamaForCausalLM", "LlamaModel", "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP"),
            required=_NO_BIAS,
        ),
        Architecture(
            "Qwen2ForCausalLM",
            "qwen2",
            ("Qwen2ForCausalLM", "Qwen2Model", "Qwen2DecoderLayer", "Qwen2Attention", "Qwen2MLP"),
            qkv_bias=True,
        ),
        Architecture(
            "Qwen3ForCausalLM",
            "qwen3",
            ("Qwen3ForCausalLM", "Qwen3Model", "Qwen3DecoderLayer", "Qwen3Attention", "Qwen2MLP"),
            head_norm=True,
            required=_NO_BIAS,
        ),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            ("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeDecoderLayer", "Qwen3MoeSparseMoeBlock"),
            head_norm=True,
            required=_NO_BIAS,
        ),
        Architecture(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            ("Glm4MoeForCausalLM", "Glm4MoeModel", "Glm4MoeDecoderLayer", "Glm4MoeAttention", "Glm4MoeMLP"),
            qkv_bias="attention_bias",
            head_norm="use_qk_norm",
            partial_rotary=0.5,
            required=(("mlp_bias", False),),
        ),
    )
}


def find(name: str, plugin: Architecture | None = None) -> Architecture | None:
    """The architecture of that name; ``plugin`` comes before those of the package."""
    return plugin if plugin is not None and plugin.name == name else BUILT_IN.get(name)


def supported(plugin: Architecture | None = None) -> str:
    """All names, for error messages."""
    return ", ".join([*BUILT_IN, *([plugin.name] if plugin and plugin.name not in BUILT_IN else [])])
