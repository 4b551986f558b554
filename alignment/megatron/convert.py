"""Weights between Hugging Face safetensors and Megatron's parameter names and layouts, bitwise both ways.

Megatron fuses the projections: ``linear_qkv`` holds, for each key-value head in turn, its query heads, its key head and
its value head; ``linear_fc1`` holds all gate rows and then all up rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from zerokl.alignment.megatron import convert_moe
from zerokl.alignment.megatron.model_config import ModelConfig, ModelError, MoeConfig
from zerokl.alignment.megatron.streams import Reader

_INDEX = "model.safetensors.index.json"
_EMBEDDING, _FINAL_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_M_EMBEDDING, _M_FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
_M_HEAD = "output_layer.weight"

# One layer's tensors that need no change: Hugging Face name -> Megatron name.
_SAME = {
    "self_attn.o_proj": "self_attention.linear_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
}
_SAME_QK = {"self_attn.q_norm": "self_attention.q_layernorm", "self_attn.k_norm": "self_attention.k_layernorm"}


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Hugging Face checkpoint of this architecture holds, with its shape."""
    hidden, head = config.hidden_size, config.head_dim
    query, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if config.qk_norm:
        layer |= dict.fromkeys(_SAME_QK, (head,))
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        if config.qkv_bias:
            biases = {"q": query, "k": kv, "v": kv}
            shapes |= {f"model.layers.{index}.self_attn.{name}_proj.bias": (rows,) for name, rows in biases.items()}
        shapes |= {f"model.layers.{index}.mlp.{name}": shape for name, shape in _mlp_shapes(config, index).items()}
    shapes[_FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def read_hf_weights(model_dir: str | Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """All tensors of a model folder (one safetensors file or an index of several), checked to be complete.

    Raises ModelError naming every missing, unexpected, misshapen or non-bf16 tensor, or the damaged file.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(Path(model_dir)):
        tensors |= read_safetensors(path)
    if config.tie_word_embeddings and _HEAD in tensors:
        _drop_tied_head(tensors, model_dir)
    check_tensors(tensors, hf_shapes(config), hf_dtype, f"weights in {model_dir}")
    return tensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of one file. Raises as `Reader`."""
    with Reader(path) as tensors:
        return dict(tensors)


def hf_dtype(name: str) -> torch.dtype:
    """What a tensor of a Hugging Face checkpoint is stored in: all are bf16 but the routers' selection biases."""
    return torch.float32 if name.endswith(convert_moe.BIAS) else torch.bfloat16


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Callable[[str], torch.dtype],
    what: str,
) -> None:
    """Raise ModelError listing every difference between ``tensors`` and what ``shapes`` and ``dtype`` ask for."""
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shapes[name]):
            problems.append(f"{name} has shape {tuple(tensor.shape)}, needs {tuple(shapes[name])}")
        if tensor.dtype != dtype(name):
            problems.append(f"{name} is {tensor.dtype}, needs {dtype(name)}")
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"{what}: {shown}. They must match config.json: use weights of the same model in these types")


def hf_to_megatron(config: ModelConfig, hf: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron's parameters from a complete set of Hugging Face tensors (see `hf_shapes`)."""
    state = {_M_EMBEDDING: hf[_EMBEDDING], _M_FINAL_NORM: hf[_FINAL_NORM]}
    if not config.tie_word_embeddings:
        state[_M_HEAD] = hf[_HEAD]
    groups = config.num_key_value_heads
    for index in range(config.num_hidden_layers):
        source, target = f"model.layers.{index}.", f"decoder.layers.{index}."
        for name, renamed in _unchanged(config).items():
            state[f"{target}{renamed}.weight"] = hf[f"{source}{name}.weight"]
        for kind in _qkv_kinds(config):
            per_group = [hf[f"{source}self_attn.{name}_proj.{kind}"].unflatten(0, (groups, -1)) for name in "qkv"]
            state[f"{target}self_attention.linear_qkv.{kind}"] = torch.cat(per_group, dim=1).flatten(0, 1)
        state |= _mlp_to_megatron(config.moe_at(index), f"{source}mlp.", f"{target}mlp.", hf)
    return state


def megatron_to_hf(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face (name, tensor) pairs, in `hf_shapes`' order.

    Tensors are views into ``state`` except q, k and v, whose rows lie interleaved in Megatron's layout.
    """
    for name, blocks in hf_blocks(config, state):
        yield name, blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def hf_blocks(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """The same without a copy: each tensor as contiguous views into ``state`` that follow one another by rows."""
    head, groups = config.head_dim, config.num_key_value_heads
    per_group = config.num_attention_heads // groups * head
    yield _EMBEDDING, (state[_M_EMBEDDING],)
    for index in range(config.num_hidden_layers):
        source, target = f"decoder.layers.{index}.", f"model.layers.{index}."
        for kind in _qkv_kinds(config):
            qkv = state[f"{source}self_attention.linear_qkv.{kind}"].unflatten(0, (groups, -1))
            for name, rows in zip("qkv", qkv.split([per_group, head, head], dim=1), strict=True):
                yield f"{target}self_attn.{name}_proj.{kind}", rows.unbind()
        for name, tensor in _mlp_to_hf(config.moe_at(index), f"{source}mlp.", f"{target}mlp.", state):
            yield name, (tensor,)
        for name, renamed in _unchanged(config).items():
            yield f"{target}{name}.weight", (state[f"{source}{renamed}.weight"],)
    yield _FINAL_NORM, (state[_M_FINAL_NORM],)
    if not config.tie_word_embeddings:
        yield _HEAD, (state[_M_HEAD],)


def _mlp_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    hidden, ffn, moe = config.hidden_size, config.intermediate_size, config.moe_at(index)
    if moe is not None:
        return convert_moe.hf_shapes(moe, hidden)
    return {"gate_proj.weight": (ffn, hidden), "up_proj.weight": (ffn, hidden), "down_proj.weight": (hidden, ffn)}


def _mlp_to_megatron(
    moe: MoeConfig | None, source: str, target: str, hf: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if moe is not None:
        return convert_moe.to_megatron(moe, source, target, hf)
    return {
        f"{target}linear_fc1.weight": torch.cat([hf[f"{source}{name}_proj.weight"] for name in ("gate", "up")]),
        f"{target}linear_fc2.weight": hf[f"{source}down_proj.weight"],
    }


def _mlp_to_hf(
    moe: MoeConfig | None, source: str, target: str, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    if moe is not None:
        yield from convert_moe.to_hf(moe, source, target, state)
        return
    gate, up = state[f"{source}linear_fc1.weight"].chunk(2)
    yield f"{target}gate_proj.weight", gate
    yield f"{target}up_proj.weight", up
    yield f"{target}down_proj.weight", state[f"{source}linear_fc2.weight"]


def _qkv_kinds(config: ModelConfig) -> tuple[str, ...]:
    return ("weight", "bias") if config.qkv_bias else ("weight",)


def _unchanged(config: ModelConfig) -> dict[str, str]:
    return _SAME | _SAME_QK if config.qk_norm else _SAME


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / _INDEX
    if not index.is_file():
        return [model_dir / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error!r}): download the model again") from error
    if any(Path(name).name != name for name in names):
        raise ModelError(f"{index} names files outside its folder: download the model again")
    return [model_dir / name for name in names]


def _drop_tied_head(tensors: dict[str, torch.Tensor], model_dir: str | Path) -> None:
    """Some checkpoints of tied models repeat the embedding as the head; that is fine if it is the same."""
    head = tensors.pop(_HEAD)
    embedding = tensors.get(_EMBEDDING)
    if embedding is not None and not torch.equal(head, embedding):
        raise ModelError(
            f"{model_dir}: config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false or remove the head"
        )
