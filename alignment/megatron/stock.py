"""The control: the same batch scored by Megatron's own local layers, in their own arithmetic."""

from __future__ import annotations

import torch

from zerokl.alignment.megatron.core import GPTModel, vocab_parallel_cross_entropy
from zerokl.alignment.megatron.stock_moe import install_replay
from zerokl.alignment.routing_replay import Replay
from zerokl.alignment.types import PackedBatch


class StockModel(torch.nn.Module):
    """Scores a `PackedBatch` with a stock GPTModel.

    Megatron's local attention takes no packed sequences, so they are laid out as padded rows, as a plain user of
    Megatron would. Top-p and top-k are not applied: a stock engine reports log-probabilities before that
    renormalisation, too.
    """

    def __init__(self, gpt: GPTModel) -> None:
        super().__init__()
        self.gpt = gpt
        self.config = gpt.config  # Megatron's DDP looks for it on the module it wraps
        self._replays = install_replay(gpt)

    def forward(self, batch: PackedBatch, replay: Replay | None = None) -> torch.Tensor:
        """fp32 [n], gradients on. ``replay``: the routing records that sparse layers follow."""
        lengths = batch.cu_seqlens.diff().long()
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        shape = (len(lengths), int(lengths.max()))
        tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        temperature = torch.ones(shape)
        tokens[sequence, batch.positions] = batch.tokens
        rows = sequence[batch.rows], batch.positions[batch.rows]
        targets[rows], temperature[rows] = batch.targets, batch.temperature
        for router in self._replays:  # which sees the tokens position by position, all sequences of each
            router.follow(replay, batch.positions * len(lengths) + sequence)
        return -self._token_loss(tokens, targets, temperature)[rows]

    def _token_loss(self, tokens: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """fp32 [B, S]: cross entropy of every token."""
        length = tokens.shape[1]
        positions = torch.arange(length).expand_as(tokens)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        if bool((temperature == 1).all()):
            return self.gpt(tokens, positions, mask, labels=targets)
        logits = self.gpt(tokens, positions, mask)
        return vocab_parallel_cross_entropy(logits.float() / temperature[..., None], targets)
