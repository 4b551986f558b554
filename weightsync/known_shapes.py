"""Shapes of large public models, for planning without their files: the sizes in their published ``config.json``."""

from __future__ import annotations

from zerokl.weightsync.model_shape import Latent, ModelShape

_LATENT = Latent(q_rank=1536, kv_rank=512, nope=128, rope=64, value=128)

SHAPES = {
    # huggingface.co/moonshotai/Kimi-K2-Instruct: DeepSeek-V3's architecture, 1.03 T parameters
    "kimi-k2": ModelShape(
        vocabulary=163840, hidden=7168, ffn=2048, layers=61, heads=64, kv_heads=64, head_dim=128, tied=False,
        experts=384, latent=_LATENT, dense_layers=1, dense_ffn=18432, shared_ffn=2048, choice_bias=True,
    ),
    # huggingface.co/deepseek-ai/DeepSeek-V3 without its multi-token prediction layer: 671 B parameters
    "deepseek-v3": ModelShape(
        vocabulary=129280, hidden=7168, ffn=2048, layers=61, heads=128, kv_heads=128, head_dim=128, tied=False,
        experts=256, latent=_LATENT, dense_layers=3, dense_ffn=18432, shared_ffn=2048, choice_bias=True,
    ),
}  # fmt: skip
