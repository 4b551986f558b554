"""SGLang's attention backend ``zerokl``: prefill, chunked prefill, prefix hits and decode through one paged kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from zerokl import kernels
from zerokl.alignment.sglang import hooks, receiving, tracing
from zerokl.alignment.sglang.config import TRACE_KEY
from zerokl.alignment.sglang.errors import UnsupportedError


@dataclass(frozen=True)
class _Batch:
    """What every layer of one forward pass shares: page_table int32 [B, pages], seq_lens and q_lens int32 [B]."""

    page_table: torch.Tensor
    seq_lens: torch.Tensor
    q_lens: torch.Tensor


class ZeroKLAttention(AttentionBackend):
    """Keys and values live in SGLang's own pool; the kernel reads them there through the batch's page table."""

    needs_cpu_seq_lens = True

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = runner.token_to_kv_pool  # by this name SGLang's model code asks for it
        self.page_size = runner.page_size
        self.batch: _Batch | None = None
        self.forwards = 0
        self.calls = 0

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Derive the batch's page table and lengths, once for all layers."""
        self.forwards += 1
        if forward_batch.forward_mode.is_idle():
            return
        longest = int(forward_batch.seq_lens_cpu.max())
        rows = self.req_to_token[:, : longest : self.page_size].index_select(0, forward_batch.req_pool_indices)
        seq_lens = forward_batch.seq_lens.to(torch.int32)
        decoding = forward_batch.forward_mode.is_decode()
        self.batch = _Batch(
            page_table=rows if self.page_size == 1 else rows // self.page_size,
            seq_lens=seq_lens,
            q_lens=torch.ones_like(seq_lens) if decoding else forward_batch.extend_seq_lens.to(torch.int32),
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **unknown: Any,
    ) -> torch.Tensor:
        """Store k, v [T, Hk, D] and attend q [T, H * D] over the cache; returns [T, H * D]."""
        if unknown or self.batch is None:
            raise UnsupportedError(f"layer {layer.layer_id}: attention arguments {sorted(unknown)} are not supported")
        self.calls += 1
        pool = self.token_to_kv_pool
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        if save_kv_cache:
            # not the pool's own setter: its indexed assignment waits for torch's OpenMP threads at every layer
            keys.index_copy_(0, forward_batch.out_cache_loc, k)
            values.index_copy_(0, forward_batch.out_cache_loc, v)
        shape = (-1, self.page_size, layer.tp_k_head_num, layer.qk_head_dim)
        out = kernels.attention_paged(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            keys.view(shape),
            values.view(shape),
            self.batch.page_table,
            self.batch.seq_lens,
            self.batch.q_lens,
            scale=layer.scaling,
        )
        return out.view(q.shape[0], -1)

    def support_triton(self) -> bool:
        return False


def create(runner: Any) -> ZeroKLAttention:
    """SGLang's factory for ``attention_backend="zerokl"``: binds the runner's loaded model and returns the backend.

    Runs in the scheduler process, after the weights are loaded and before the first forward pass. Raises
    UnsupportedError or HookError, which stops the engine's start.
    """
    backend = ZeroKLAttention(runner)
    binding = hooks.bind(runner, backend)
    if getattr(runner.model.config, TRACE_KEY, False):
        tracing.attach(runner)
    weights = receiving.attach(runner)
    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
        lambda result, *_: _add_report(result, binding.reports(weights())),
        HookType.AFTER,
    )
    HookRegistry.apply_hooks()
    return backend


def _add_report(result: Any, reports: list[dict[str, Any]]) -> Any:
    """SGLang's own state read-back, which runs on every rank, carries the reports out of the first one's process."""
    result.internal_state["zerokl"] = reports
    return result
