"""Tiny random models for tests and first steps: real architectures, seconds to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

VOCAB = 320  # 256 bytes, the special tokens, and room to spare
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
    # wide enough that attention and the logits are far from uniform
    "initializer_range": 0.08,
}  # fmt: skip
"""What all tiny models have in common."""


def make(family: Literal["llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe"], out: Path, *, seed: int) -> None:
    """Fill the existing folder `out` with config, bf16 weights and a byte-level tokenizer."""
    from transformers import Glm4MoeConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

    if family == "llama":
        config = LlamaConfig(architectures=["LlamaForCausalLM"], tie_word_embeddings=False, rope_theta=10000.0, **SHAPE)
    elif family == "qwen2":
        config = Qwen2Config(architectures=["Qwen2ForCausalLM"], tie_word_embeddings=True, rope_theta=1e6, **SHAPE)
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"], tie_word_embeddings=False, rope_theta=1e6, num_experts=8,
            num_experts_per_tok=3, moe_intermediate_size=96, norm_topk_prob=True, decoder_sparse_step=1, **SHAPE,
        )  # fmt: skip
    elif family == "glm4_moe":
        config = Glm4MoeConfig(
            architectures=["Glm4MoeForCausalLM"], tie_word_embeddings=False, use_qk_norm=True, n_routed_experts=16,
            num_experts_per_tok=4, n_group=4, topk_group=2, n_shared_experts=1, moe_intermediate_size=96,
            norm_topk_prob=True, num_mtp_layers=0, attention_bias=True,
            # large, so that the last bit of the experts' sum survives its addition to what came before
            routed_scaling_factor=8.0,
            first_k_dense_replace=1, **(SHAPE | {"num_hidden_layers": 3}),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        )  # fmt: skip
    else:
        config = Qwen3Config(architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True, rope_theta=1e6, **SHAPE)
    write(config, out, seed=seed)


def write(config: Any, out: Path, *, seed: int) -> None:
    """Fill the existing folder `out` with a random model of a transformers configuration and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        _randomise(model)
    model.save_pretrained(out)
    _tokenizer().save_pretrained(out)


def _randomise(model: Any) -> None:
    """Norm weights start at exactly 1 and biases at 0, which would hide a layer that forgets them."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("_proj.bias"):
                parameter.uniform_(-0.1, 0.1)  # larger ones would drown what the layers add
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[0],
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
