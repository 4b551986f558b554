"""How a model is laid out over ranks, and which layouts this binding computes with the bits of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.alignment.tensor_parallel import Widths, size_problem, width_problem


class LayoutError(ModelError):
    """A layout that cannot be used; the message names the sizes and what is supported."""


class Place(NamedTuple):
    """Which part of the model a chunk is, each number from 0: nothing else decides what it holds.

    ``stage`` counts model chunks in order of depth, virtual stages included.
    """

    tensor: int = 0
    stage: int = 0
    expert: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; what the ranks have beyond ``ranks`` is data parallel.

    ``expert``: ranks that share the experts, each expert whole on one (Megatron's expert tensor parallel size is 1).
    They are neighbours among the tensor-, context- and data-parallel ranks of a pipeline stage.

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
        """Ranks that compute one micro-batch (experts may be spread over more)."""
        return self.tensor * self.pipeline * self.context

    @property
    def stages(self) -> int:
        """Model chunks in all, in order of depth."""
        return self.pipeline * self.virtual_pipeline

    @property
    def token_multiple(self) -> int:
        """What a micro-batch's number of tokens must be a multiple of; it is padded to that."""
        return self.context * self.tensor

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds only a part of the model."""
        return self.tensor * self.pipeline * self.expert > 1

    def check_world(self, world: int) -> None:
        """Raise LayoutError unless ``world`` ranks divide into this layout."""
        self._require(
            world % self.ranks == 0 and world // self.pipeline % self.expert == 0,
            f"{world} ranks do not divide into {self}: start as many as it needs",
        )

    def places(self, rank: int, world: int) -> list[Place]:
        """The chunks of one of ``world`` ranks, in order of depth.

        Ranks count as Megatron's default order does: tensor fastest, then context, then data, pipeline slowest; expert
        parallel ranks are neighbours. Raises LayoutError if they do not divide.
        """
        self.check_world(world)
        stage, inner = divmod(rank, world // self.pipeline)
        return [
            Place(inner % self.tensor, virtual * self.pipeline + stage, inner % self.expert)
            for virtual in range(self.virtual_pipeline)
        ]

    def layers(self, place: Place, model: ModelConfig) -> range:
        """The layers of the whole model, from 0, that the chunk at ``place`` holds."""
        depth = model.num_hidden_layers // self.stages
        return range(place.stage * depth, (place.stage + 1) * depth)

    def every_place(self) -> list[Place]:
        """All of them; ranks may hold fewer combinations of a tensor and an expert part."""
        return [Place(*at) for at in product(range(self.tensor), range(self.stages), range(self.expert))]

    def check(self, model: ModelConfig) -> None:
        """Raise LayoutError naming what of the model does not divide, or what is not supported for it."""
        moe = model.moe
        widths = Widths(
            heads=model.num_attention_heads,
            kv_heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            intermediate=model.intermediate_size,
            vocabulary=model.vocab_size,
            experts=None if moe is None else moe.intermediate_size,
        )
        self._refuse(width_problem(widths, tensor=self.tensor, segments=self.segments, context=self.context))
        layers = model.num_hidden_layers
        self._require(layers % self.stages == 0, f"{layers} layers do not divide into {self.stages} stages")
        if model.moe is None:
            self._require(self.expert == 1, f"expert={self.expert}, but {model.architecture} is dense")
            return
        experts = model.moe.router.experts
        self._require(experts % self.expert == 0, f"{experts} experts do not divide over expert={self.expert}")

    def _require(self, condition: bool, message: str) -> None:
        self._refuse(None if condition else message)

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise LayoutError(f"layout: {problem}")
