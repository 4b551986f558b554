"""A module with SGLang's fused parameters, as far as names and shapes go, and weights for it."""

import pytest
import torch

HIDDEN, HEADS, KV, DIM, FFN, VOCAB = 8, 2, 1, 4, 6, 10


class Attention(torch.nn.Module):
    """SGLang's fused attention, as far as names and shapes go."""

    def __init__(self) -> None:
        super().__init__()
        self.q_size, self.kv_size = HEADS * DIM, KV * DIM
        self.qkv_proj = torch.nn.Linear(HIDDEN, self.q_size + 2 * self.kv_size, dtype=torch.bfloat16)
        self.o_proj = torch.nn.Linear(self.q_size, HIDDEN, bias=False, dtype=torch.bfloat16)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = torch.nn.Module()
        self.mlp.gate_up_proj = torch.nn.Linear(HIDDEN, 2 * FFN, bias=False, dtype=torch.bfloat16)
        self.embed_tokens = torch.nn.Embedding(16, HIDDEN, dtype=torch.bfloat16)  # padded from VOCAB
        self.embed_tokens.org_vocab_size = VOCAB  # type: ignore[assignment]
        self.lm_head = self.embed_tokens  # tied


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN), "self_attn.q_proj.bias": (HEADS * DIM,),
        "self_attn.k_proj.weight": (KV * DIM, HIDDEN), "self_attn.k_proj.bias": (KV * DIM,),
        "self_attn.v_proj.weight": (KV * DIM, HIDDEN), "self_attn.v_proj.bias": (KV * DIM,),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "mlp.gate_proj.weight": (FFN, HIDDEN), "mlp.up_proj.weight": (FFN, HIDDEN),
        "embed_tokens.weight": (VOCAB, HIDDEN),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
