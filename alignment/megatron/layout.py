"""How a model is laid out over ranks, and which layouts this binding computes with the bits of one rank."""

from __future__ import annotations

from dataclasses import dataclass

from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.alignment.tensor_parallel import Widths, size_problem, width_problem


class LayoutError(ModelError):
    """A layout that cannot be used; the message names the sizes and what is supported."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; what the ranks have beyond ``ranks`` is data parallel.

    ``segments`` is G of contract R2: into how many chains a row-parallel product is cut, whatever ``tensor`` is. Log-
    probabilities are equal bits in all layouts of the same G, so both engines take the same: the smallest power of two
    that covers both tensor-parallel sizes. ``virtual_pipeline``: model chunks a stage holds.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    context: int = 1
    sequence_parallel: bool = False
    segments: int = 1

    def __post_init__(self) -> None:
        self._refuse(size_problem(self.tensor, self.segments))
        for name in ("pipeline", "virtual_pipeline", "expert", "context"):
            size = getattr(self, name)
            self._require(size >= 1, f"{name}={size} must be positive")
        self._require(not self.sequence_parallel or self.tensor > 1, "sequence_parallel needs tensor above 1")
        self._require(
            self.virtual_pipeline == 1 or self.pipeline > 1, "virtual_pipeline needs pipeline stages; set pipeline"
        )

    @property
    def ranks(self) -> int:
        """Ranks that hold one copy of the model (experts are spread over copies)."""
        return self.tensor * self.pipeline * self.context

    @property
    def stages(self) -> int:
        """Model chunks in all, in order of depth."""
        return self.pipeline * self.virtual_pipeline

    @property
    def token_multiple(self) -> int:
        """What a micro-batch's number of tokens must be a multiple of; it is padded to that."""
        return self.context * (self.tensor if self.sequence_parallel else 1)

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds only a part of the model."""
        return self.tensor * self.pipeline * self.expert > 1

    def check(self, model: ModelConfig) -> None:
        """Raise LayoutError naming what of the model does not divide, or what is not supported for it."""
        widths = Widths(
            heads=model.num_attention_heads,
            kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            intermediate=model.intermediate_size,
            vocabulary=model.vocab_size,
            experts=None if model.moe is None else model.moe.intermediate_size,
        )
        self._refuse(width_problem(widths, tensor=self.tensor, segments=self.segments, context=self.context))
        layers = model.num_hidden_layers
        self._require(layers % self.stages == 0, f"{layers} layers do not divide into {self.stages} stages")
        if model.moe is None:
            self._require(self.expert == 1, f"expert={self.expert}, but {model.architecture} is dense")
            return
        self._require(
            self.ranks == 1,
            f"{model.architecture} in tensor={self.tensor}, pipeline={self.pipeline}, context={self.context}; "
            "supported: 1, 1, 1",
        )
        experts = model.moe.router.experts
        self._require(experts % self.expert == 0, f"{experts} experts do not divide over expert={self.expert}")

    def _require(self, condition: bool, message: str) -> None:
        self._refuse(None if condition else message)

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise LayoutError(f"layout: {problem}")
