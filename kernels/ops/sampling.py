"""Counter-based sampling (R0, R6): a token depends on (seed, position) and its row of logits only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._common import check, check_device, ops, per_row
from .linear import linear


class Sampled(NamedTuple):
    """token int64 [T]; logprob fp32 [T], as sampled; raw_logprob fp32 [T], at temperature 1 without filters."""

    token: torch.Tensor
    logprob: torch.Tensor
    raw_logprob: torch.Tensor


def sample(
    logits: torch.Tensor,
    *,
    seed: torch.Tensor,
    position: torch.Tensor,
    temperature: torch.Tensor | float = 1.0,
    top_p: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
    head: torch.Tensor | None = None,
) -> Sampled:
    """Draw one token a row by the Gumbel-max rule with a hash of (seed, position, token) as the random number.

    Args:
        logits: fp32 [T, V]; with ``head`` the hidden states, bf16 [T, H].
        seed, position: int64 [T].
        temperature: scalar or [T]; 0 takes the largest logit (lowest index among equals) and reports the raw
            log-probability as both.
        top_p, top_k: as in :func:`zerokl.kernels.selected_logprob`.
        head: bf16 [V, H], the output head: the logits are ``linear(hidden, head)`` in fp32 (R6).

    Raises:
        ValueError: unsupported dtype or shape. RuntimeError: a negative temperature, a top_p outside (0, 1].
    """
    op = "sample"
    if head is not None:
        logits = linear(logits, head, out_dtype=torch.float32)
    check(
        logits.dim() == 2 and logits.dtype == torch.float32,
        op,
        f"logits must be fp32 [T, V], got {logits.dtype} {tuple(logits.shape)}",
    )
    check_device(op, logits=logits)
    rows = logits.shape[0]
    t, p, k = (
        per_row(temperature, rows, torch.float32, logits.device, op, "temperature"),
        per_row(top_p, rows, torch.float32, logits.device, op, "top_p"),
        per_row(top_k, rows, torch.int32, logits.device, op, "top_k"),
    )
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob, raw = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    ops.sample(
        logits.contiguous(),
        t,
        p,
        k,
        per_row(seed, rows, torch.int64, logits.device, op, "seed"),
        per_row(position, rows, torch.int64, logits.device, op, "position"),
        token,
        logprob,
        raw,
    )
    return Sampled(token, logprob, raw)
