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
from zerokl.alignment.megatron import regions
from zerokl.alignment.megatron.core import (
    ColumnParallelLinear,
    GPTModel,
    MegatronModule,
    PackedSeqParams,
    RowParallelLinear,
    TransformerConfig,
    parallel_state,
)
from zerokl.alignment.routing_replay import Replay
from zerokl.alignment.types import PackedBatch


@dataclass
class PackedPositions(PackedSeqParams):
    """Megatron's packed-sequence description, with the position of each of this rank's tokens in its own sequence
    (int64 [T / context]) and the experts to replay, if any: what reaches every layer with the micro-batch."""

    positions: torch.Tensor = None  # type: ignore[assignment]  # as Megatron declares its own fields
    replay: Replay | None = None

    @staticmethod
    def of(batch: PackedBatch, replay: Replay | None) -> PackedPositions:
        cu = batch.cu_seqlens
        positions = regions.own_part(batch.positions, parallel_state.get_context_parallel_group())
        return PackedPositions(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, positions=positions, replay=replay)


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
    """`ColumnParallelLinear` by `kernels.linear`: every rank computes its own columns. The input's gradient adds up in
    ``segments`` chains by R2's tree, whatever the number of ranks."""

    def __init__(self, *args: Any, segments: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.segments = segments

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.gather_output or runtime_gather_output or weight is not None:
            raise NotImplementedError("ColumnLinear: gather_output and a weight of the call are not supported")
        bias, skipped = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        if self.segments == 1:
            return kernels.linear(input_, self.weight, bias), skipped
        if self.config.sequence_parallel:
            input_ = regions.gather_tokens(input_, self.tp_group)
        blocks = self.weight.partition_stride  # 2: gate rows and up rows
        y = kernels.column_linear(input_, self.weight, bias, segments=self.segments, blocks=blocks, group=self.tp_group)
        return y, skipped


class RowLinear(RowParallelLinear):
    """`RowParallelLinear` whose product is `kernels.linear` in ``segments`` chains, added over ranks by R2's tree."""

    def __init__(self, *args: Any, segments: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if segments % self.tp_group.size():
            raise NotImplementedError(
                f"RowLinear: tensor parallel size {self.tp_group.size()} does not divide segments={segments} "
                "(contract R2); raise Layout.segments"
            )
        self.own_segments = segments // self.tp_group.size()

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = None if self.skip_bias_add else self.bias
        skipped = self.bias if self.skip_bias_add else None
        if self.tp_group.size() == 1:
            return kernels.linear(input_, self.weight, bias, segments=self.own_segments), skipped
        if bias is not None:
            raise NotImplementedError("RowLinear: a bias under tensor parallelism is not supported")
        part = kernels.linear(input_, self.weight, segments=self.own_segments, out_dtype=torch.float32)
        y = kernels.tree_all_reduce(part, self.tp_group).to(torch.bfloat16)
        return regions.split_tokens(y, self.tp_group) if self.config.sequence_parallel else y, skipped


class SwiGLU(MegatronModule):
    """``silu(gate) * up``: [..., 2F] -> [..., F], rounded once. Stands where Transformer Engine's activation would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.silu_and_mul(x)


class CoreAttention(MegatronModule):
    """Rotary embedding and causal attention over packed sequences.

    Under context parallelism a rank holds consecutive tokens outside and some heads of all tokens inside: a head's
    arithmetic does not know of the other heads, so R5 holds as on one rank, absolute positions and segments included.

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
        """query [t, H, D], key and value [t, Hk, D] of this rank's tokens -> [t, H * D].

        Raises TypeError without `PackedPositions`.
        """
        if not isinstance(packed_seq_params, PackedPositions) or attention_mask is not None:
            raise TypeError("attention takes packed sequences only: pass packed_seq_params=PackedPositions, no mask")
        query, key = kernels.rotary(
            query.contiguous(),
            key.contiguous(),
            packed_seq_params.positions,
            self.rotary_table,
            interleaved=self.config.rotary_interleaved,
        )
        group = parallel_state.get_context_parallel_group()
        query, key, value = (regions.tokens_for_heads(x, group) for x in (query, key, value))
        out = kernels.attention_varlen(query, key, value.contiguous(), packed_seq_params.cu_seqlens_q, scale=self.scale)
        return regions.heads_for_tokens(out, group).flatten(1)


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
        """fp32 [n]: for each of ``batch.rows`` the log-probability of ``batch.targets``, gradients on.

        A stage that is not the last returns its hidden states, bf16 [T, 1, H].
        """
        hidden = self.embed(batch) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, packed_seq_params=PackedPositions.of(batch, replay)
        )
        return self.score(hidden.squeeze(1), batch) if self.post_process else hidden

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """bf16 [t, 1, H] of this rank's tokens, split for context and then for sequence parallelism."""
        table, group = self.embedding.word_embeddings.weight, self.pg_collection.tp
        tokens = regions.own_part(batch.tokens, self.pg_collection.cp)
        hidden = regions.embedding(tokens, table, self.vocab_size, group).unsqueeze(1)
        return regions.split_tokens(hidden, group) if self.config.sequence_parallel else hidden

    def score(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """fp32 [n] from the last layer's normalised output [t, H]."""
        group, context = self.pg_collection.tp, self.pg_collection.cp
        if self.config.sequence_parallel:
            hidden = regions.gather_tokens(hidden, group)
        head = self.output_layer.weight
        if self.share_embeddings_and_output_weights:
            head = self.shared_embedding_or_output_weight()
        if context.size() == 1:
            return self._score_rows(hidden, head, batch, batch.rows, slice(None))
        first = context.rank() * len(hidden)
        mine = ((batch.rows >= first) & (batch.rows < first + len(hidden))).nonzero()[:, 0]
        own = self._score_rows(hidden, head, batch, batch.rows[mine] - first, mine)
        return regions.merge_disjoint(own.new_zeros(len(batch.rows)).index_copy(0, mine, own), context)

    def _score_rows(
        self, hidden: torch.Tensor, head: torch.Tensor, batch: PackedBatch, rows: torch.Tensor, which: Any
    ) -> torch.Tensor:
        """The log-probabilities of the batch's targets ``which``, whose hidden states are ``rows`` of ``hidden``."""
        group = self.pg_collection.tp
        shared = {} if group.size() == 1 else {"group": group, "vocabulary": self.vocab_size}
        return kernels.selected_logprob(
            hidden.index_select(0, rows),
            head,
            batch.targets[which],
            temperature=batch.temperature[which],
            top_p=batch.top_p[which],
            top_k=batch.top_k[which],
            **shared,
        ).logprob
