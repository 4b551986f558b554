"""Megatron's building blocks computed by `zerokl.kernels`.

Each class keeps Megatron's constructor, parameters and sharding, so checkpoints, optimizers and parallel layouts see
what they always see; only the arithmetic of ``forward`` is replaced. Activations are ``[tokens, 1, hidden]`` bf16, the
packed (``thd``) form of Megatron's ``[sequence, batch, hidden]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from zerokl import kernels
from zerokl.alignment.megatron.core import (
    ColumnParallelLinear,
    GPTModel,
    MegatronModule,
    PackedSeqParams,
    RowParallelLinear,
    TransformerConfig,
)
from zerokl.alignment.routing_replay import Replay
from zerokl.alignment.types import PackedBatch


@dataclass
class PackedPositions(PackedSeqParams):
    """Megatron's packed-sequence description, with each token's position in its own sequence (int64 [T]) and the
    experts to replay, if any: what reaches every layer with the micro-batch."""

    positions: torch.Tensor = None  # type: ignore[assignment]  # as Megatron declares its own fields
    replay: Replay | None = None

    @staticmethod
    def of(batch: PackedBatch, replay: Replay | None) -> PackedPositions:
        cu = batch.cu_seqlens
        return PackedPositions(
            qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, positions=batch.positions, replay=replay
        )


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension; also the per-head norm of queries and keys."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron all-reduces gradients of parameters so marked when the sequence is split over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """bf16 [..., hidden_size] -> the same shape."""
        return kernels.rms_norm(x, self.weight, self.eps)


class ColumnLinear(ColumnParallelLinear):
    """`ColumnParallelLinear` whose product is `kernels.linear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_one_rank(self)

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        del runtime_gather_output  # one rank holds every column
        bias = None if self.skip_bias_add else self.bias
        y = kernels.linear(input_, self.weight if weight is None else weight, bias)
        return y, self.bias if self.skip_bias_add else None


class RowLinear(RowParallelLinear):
    """`RowParallelLinear` whose product is `kernels.linear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_one_rank(self)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None if self.skip_bias_add else self.bias
        return kernels.linear(input_, self.weight, bias), self.bias if self.skip_bias_add else None


def _require_one_rank(linear: ColumnParallelLinear | RowParallelLinear) -> None:
    if linear.tp_group.size() > 1:
        raise NotImplementedError(
            f"{type(linear).__name__}: tensor parallel size {linear.tp_group.size()} is not supported, because the "
            "fp32 segment tree across ranks (contract R2) is not implemented; set tensor_model_parallel_size=1"
        )


class SwiGLU(MegatronModule):
    """``silu(gate) * up``: [..., 2F] -> [..., F], rounded once. Stands where Transformer Engine's activation would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.silu_and_mul(x)


class CoreAttention(MegatronModule):
    """Rotary embedding and causal attention over packed sequences.

    The rotation lives here, not in GPTModel, because Megatron rounds cosines and sines to bf16 first.
    """

    def __init__(
        self, config: TransformerConfig, *, rotary_table: torch.Tensor, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.rotary_table = rotary_table  # fp32, shared by all layers; derived from the config, so not a buffer
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """query [T, H, D], key and value [T, Hk, D] -> [T, H * D]. Raises TypeError without `PackedPositions`."""
        if not isinstance(packed_seq_params, PackedPositions) or attention_mask is not None:
            raise TypeError("attention takes packed sequences only: pass packed_seq_params=PackedPositions, no mask")
        query, key = kernels.rotary(
            query.contiguous(),
            key.contiguous(),
            packed_seq_params.positions,
            self.rotary_table,
            interleaved=self.config.rotary_interleaved,
        )
        out = kernels.attention_varlen(query, key, value.contiguous(), packed_seq_params.cu_seqlens_q, scale=self.scale)
        return out.flatten(1)


def residual_add(_training: bool, _fused: bool) -> Callable[..., torch.Tensor]:
    """Megatron's bias-dropout-add slot: the fp32 sum of two bf16 tensors, rounded once (contract R7).

    torch adds bf16 tensors exactly so, and the next norm reads the rounded sum: the same bits as
    ``kernels.rms_norm(x, w, eps, residual=r)``.
    """

    def add(
        x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, _dropout: float
    ) -> torch.Tensor:
        x, bias = x_with_bias
        if bias is not None:
            raise NotImplementedError("a bias on the residual branch is not supported; use add_bias_linear=False")
        return residual + x

    return add


class ScoringModel(GPTModel):
    """GPTModel that returns log-probabilities of chosen tokens instead of logits for all.

    Embedding and output layer keep Megatron's parameters; the look-up and the head are `kernels` ops, and the head
    only sees the rows that are scored.
    """

    def forward(self, batch: PackedBatch, replay: Replay | None = None) -> torch.Tensor:
        """fp32 [n]: for each of ``batch.rows`` the log-probability of ``batch.targets``, gradients on."""
        hidden = kernels.embedding(batch.tokens, self.embedding.word_embeddings.weight).unsqueeze(1)
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=PackedPositions.of(batch, replay)
        ).squeeze(1)
        head = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return kernels.selected_logprob(
            hidden.index_select(0, batch.rows),
            self.output_layer.weight if head is None else head,
            batch.targets,
            temperature=batch.temperature,
            top_p=batch.top_p,
            top_k=batch.top_k,
        ).logprob
