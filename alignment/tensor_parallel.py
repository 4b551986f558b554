"""Tensor parallelism that changes no bit, as both engines take it: which models divide, and which part a rank holds.

Row-parallel products are cut into R2's segments, which ranks share evenly; so are heads and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIZES = (1, 2, 4, 8)
"""Numbers of tensor-parallel ranks, and of segments."""

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Widths:
    """What of a model is cut. ``experts``: width of one expert; None: the model is dense."""

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    experts: int | None = None

    def cut(self) -> dict[str, int]:
        """The widths that fall into segments: what row-parallel products add over, forward and backward."""
        widths = {
            "intermediate_size": self.intermediate,
            "attention's output": self.heads * self.head_dim,
            "attention's input projection": (self.heads + 2 * self.kv_heads) * self.head_dim,
        }
        return widths if self.experts is None else widths | {"moe_intermediate_size": self.experts}


def size_problem(tensor: int, segments: int) -> str | None:
    """What is wrong with these numbers of ranks and segments, whatever the model."""
    for name, size in {"tensor": tensor, "segments": segments}.items():
        if size not in SIZES:
            return f"{name}={size}; supported: 1, 2, 4, 8"
    return f"segments={segments} must cover tensor={tensor}" if segments % tensor else None


def width_problem(
    widths: Widths, *, tensor: int, segments: int, context: int = 1, vocabulary_multiple: int = 8
) -> str | None:
    """What of a model does not divide over segments, or over ranks. ``context`` ranks split heads inside attention."""
    return next(_width_problems(widths, tensor, segments, context, vocabulary_multiple), None)


def _width_problems(
    widths: Widths, tensor: int, segments: int, context: int, vocabulary_multiple: int
) -> Iterator[str]:
    for name, width in widths.cut().items():
        if segments > 1 and width % (2 * segments):
            yield f"{name} {width} does not divide into segments={segments} of whole pairs"
    if widths.kv_heads % (tensor * context):
        yield f"{widths.kv_heads} key-value heads do not divide over tensor={tensor} times context={context}"
    if tensor > 1 and widths.vocabulary % vocabulary_multiple:
        yield (
            f"a vocabulary of {widths.vocabulary} over tensor={tensor}; supported: multiples of {vocabulary_multiple}"
        )


def rank_part(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part of the tensor with this Hugging Face name: its rows, its columns, or (norms, routers) all of it.

    A view. The sizes must divide (`width_problem`).
    """
    module = name.split(".")[-2] if "." in name else name
    if module in _ROWS:
        return whole.chunk(ranks)[rank]
    return whole.chunk(ranks, 1)[rank] if module in _COLUMNS else whole


def rank_name(name: str, rank: int, ranks: int) -> str:
    """How a rank's part is called among those of all: by the tensor's name alone where one rank holds all."""
    return name if ranks == 1 else f"{name}@{rank}"
