"""The recipe: typed, checked as a whole before anything starts, every problem named in one error.

A recipe is a TOML file with the tables below; `--set table.key=value` replaces single values. The resolved
configuration (defaults included) is what a run directory keeps, and what `--dry-run` prints.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from zerokl.orchestrate.errors import UserError

if TYPE_CHECKING:
    from zerokl.alignment.correction import Correction

Options = dict[str, Any]


class Table(BaseModel):
    """A table of the recipe: no unknown keys, no silent conversion of types, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelTable(Table):
    """Which model is trained: a known name or a Hugging Face folder."""

    name: str = Field(min_length=1)
    architecture: str | None = Field(
        default=None, description="package.module.SPEC or file.py:SPEC of one the package does not know"
    )
    segments: Literal[1, 2, 4, 8] = Field(
        default=1, description="G of contract R2, in both engines: decides bits, covers every tensor-parallel size"
    )


class RolloutTable(Table):
    """How responses are sampled, and how the engine is laid out."""

    prompts_per_step: int = Field(default=8, ge=1)
    group_size: int = Field(default=8, ge=2, description="responses per prompt: GRPO compares them with each other")
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(
        default=1.0, gt=0, le=10, description="0 (greedy) gives equal responses: nothing to learn from"
    )
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0 switches the filter off; 1 would be greedy")
    max_prompt_tokens: int = Field(default=512, ge=1)
    max_running_requests: int = Field(default=64, ge=1)
    chunked_prefill_tokens: int = Field(default=512, ge=16)
    kv_cache_tokens: int = Field(default=16384, ge=64)
    tensor_parallel: Literal[1, 2, 4, 8] = Field(
        default=1, description="ranks that share the model (changes no bit); model.segments must cover it"
    )
    engines: int = Field(default=1, ge=1, description="how many share a step's prompts (changes no bit)")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="of an engine; default: engines share all cores (and take turns with training)",
    )

    @model_validator(mode="after")
    def _possible(self) -> RolloutTable:
        if self.top_k == 1:
            raise ValueError("top_k = 1 is greedy: every response of a group would be the same")
        if self.engines > self.prompts_per_step:
            raise ValueError(f"engines = {self.engines} exceeds prompts_per_step: some would have nothing to do")
        if self.max_prompt_tokens + self.max_new_tokens > self.kv_cache_tokens:
            raise ValueError("max_prompt_tokens + max_new_tokens exceeds kv_cache_tokens")
        return self


class ParallelTable(Table):
    """How the trainer is laid out over ranks, each a process: log-probabilities have the same bits in every layout."""

    tensor: Literal[1, 2, 4, 8] = Field(default=1, description="model.segments must cover it")
    pipeline: int = Field(default=1, ge=1)
    virtual_pipeline: int = Field(default=1, ge=1, description="model chunks that a stage holds")
    expert: int = Field(default=1, ge=1, description="ranks that share the experts, among those of a stage")
    context: int = Field(default=1, ge=1)
    data: int = Field(default=1, ge=1, description="replicas, which share a step's micro-batches")
    sequence_parallel: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


class TrainTable(Table):
    """The optimizer (Adam) and how a step's tokens are cut into micro-batches."""

    steps: int = Field(ge=1)
    learning_rate: float = Field(default=1e-6, gt=0, le=1)
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    microbatch_tokens: int = Field(default=2048, ge=1)
    recompute: bool = False
    routing_replay: Literal["off", "on", "check"] = Field(
        default="off", description="experts as chosen in the rollout; check also counts tokens routed otherwise"
    )
    threads: int | None = Field(default=None, ge=1, description="of a rank; default: the ranks share all cores")
    parallel: ParallelTable = ParallelTable()

    @model_validator(mode="after")
    def _betas(self) -> TrainTable:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class AlgorithmTable(Table):
    """GRPO (see `orchestrate/algorithms/grpo.py` for the formulas)."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0)
    normalize_std: bool = True


class CorrectionTable(Table):
    """Importance weights where rollout and trainer differ on purpose (formulas in `alignment/correction.py`).

    The proximal policy is the one a step starts from, so its log-probabilities are those of the step's own forward.
    """

    enabled: bool = False
    old: Literal["proximal", "rollout"] = Field(default="proximal", description="the policy the loss clips around")
    level: Literal["token", "sequence", "geometric"] = "token"
    outside: Literal["truncate", "mask"] = Field(default="truncate", description="what a ratio outside the bounds gets")
    lower: float = 0.0
    upper: float | None = Field(default=None, description="left out: no upper bound")

    @model_validator(mode="after")
    def _possible(self) -> CorrectionTable:
        if self.model_fields_set:  # not for the defaults: the import below is slow
            self._settings()
        return self

    def settings(self) -> Correction | None:
        """What `correct` takes; None where it is off."""
        return self._settings() if self.enabled else None

    def _settings(self) -> Correction:
        """Raises ValueError with every impossible value."""
        from zerokl.alignment.correction import Correction

        return Correction(**self.model_dump(exclude={"enabled"}))


class DataTable(Table):
    """Where tasks come from: a callable `source(seed, **options)`, and how a task becomes a prompt.

    ``template``: "chat" (the tokenizer's own), or text with {prompt} and any of the task's fields in braces.
    """

    source: str = Field(min_length=1)
    options: Options = {}
    template: str = "chat"

    @model_validator(mode="after")
    def _template(self) -> DataTable:
        if self.template != "chat" and "{" not in self.template:
            raise ValueError('template must be "chat" or hold a field such as {prompt}')
        return self


class RewardTable(Table):
    """What a response is worth: a callable `reward(task, response, **options) -> float`."""

    function: str = Field(min_length=1)
    options: Options = {}
    timeout_s: float = Field(default=60.0, gt=0, description="for one step's responses together")


class WeightsyncTable(Table):
    """How new weights reach the engine (see `weightsync`), and what becomes of requests under way when they come."""

    transport: Literal["auto", "ipc", "disk", "rdma", "collective", "cuda_ipc", "mooncake"] = Field(
        default="auto", description="auto: chosen from where both sides are (weightsync/topology.py)"
    )
    in_flight: Literal["abort", "retract", "continue"] = Field(
        default="abort", description="between the steps of a synchronous loop there are none"
    )
    floor_gb_per_s: float = Field(default=0.0, ge=0, description="a slower transfer is refused, not put up with")


class ControlTable(Table):
    """The first step once more with the engines' own kernels, after training: what the difference would have been."""

    enabled: bool = False
    samples: int = Field(default=16, ge=1)


class ClusterTable(Table):
    """Where the run's processes are: on this machine, or on the hosts of a running Ray cluster.

    All hosts need zerokl installed, one user, and folders that all see for the model and `run.directory`.
    """

    address: str = Field(
        default="",
        pattern=r"^(\S+:\d+)?$",
        description='"host:port" of the cluster, whose token Ray finds; empty: a private Ray, loopback only',
    )


class RunTable(Table):
    """Seed, checkpoints, deadlines and sinks."""

    directory: str = Field(default="runs/run", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    checkpoint_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    tensorboard: bool = False
    stop_on_mismatch: bool = Field(
        default=True, description="end the run (exit 1) at the first token whose bits differ"
    )
    start_timeout_s: float = Field(default=300.0, gt=0)
    step_timeout_s: float = Field(default=1800.0, gt=0)


class Config(Table):
    """A whole recipe."""

    model: ModelTable
    train: TrainTable
    data: DataTable
    reward: RewardTable
    rollout: RolloutTable = RolloutTable()
    algorithm: AlgorithmTable = AlgorithmTable()
    correction: CorrectionTable = CorrectionTable()
    weightsync: WeightsyncTable = WeightsyncTable()
    control: ControlTable = ControlTable()
    cluster: ClusterTable = ClusterTable()
    run: RunTable = RunTable()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        longest = self.rollout.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.train.microbatch_tokens:
            raise ValueError(
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} does not fit into "
                f"train.microbatch_tokens = {self.train.microbatch_tokens}"
            )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps = {self.train.warmup_steps} exceeds train.steps = {self.train.steps}")
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the recipe at `path`, apply `table.key=value` overrides, check everything.

    Raises UserError that lists every problem found: syntax, unknown keys, wrong types, impossible values.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}", "give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}", "see recipes/demo.toml for an example") from error
    problems = [problem for text in overrides if (problem := _override(values, text))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{path} has {len(problems)} problem(s):\n{listing}", "nothing was started")
    return config


def _override(values: dict[str, Any], text: str) -> str | None:
    """Apply one `table.key=value` in place; returns what is wrong with it, if anything.

    The value is read as TOML (`3`, `1e-6`, `true`, `"text"`, `[1, 2]`); what is no TOML value is taken as text.
    """
    key, equals, raw = text.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        return f"--set {text!r}: write table.key=value, e.g. train.steps=10"
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    table: Any = values
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            return f"--set {text!r}: {name} is a value, not a table"
    table[path[-1]] = value
    return None


def _describe(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    if item["type"] == "missing":
        return f"{where}: required"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
    return f"{where}: {message}{shown}"
