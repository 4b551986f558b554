"""How a rollout engine is started, and the checks of its model and requests made before anything runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from zerokl.alignment import architectures
from zerokl.alignment.architectures import Architecture
from zerokl.alignment.routing import Router, RoutingError, router_of
from zerokl.alignment.sglang.errors import UnsupportedError
from zerokl.alignment.tensor_parallel import Widths, size_problem, width_problem
from zerokl.alignment.types import Request

DISABLED_HOOKS_KEY = "zerokl_disabled_hooks"
"""Key in the model config's overrides through which `EngineConfig.disabled_hooks` reaches SGLang's scheduler."""

ARCHITECTURE_KEY = "zerokl_architecture"
"""The same for `EngineConfig.architecture`, as a JSON object."""
TRACE_KEY = "zerokl_trace"
"""The same for `EngineConfig.trace`."""
SEGMENTS_KEY = "zerokl_segments"
"""The same for `EngineConfig.segments`; of the engines started here in all that run zerokl's kernels, in no other."""

_VOCABULARY_MULTIPLE = 64  # SGLang pads the vocabulary to it; a rank's share is to hold no padding
TRANSFER_KEY = "zerokl_transfer"
"""The same for `EngineConfig.transfer`, as a JSON object: the token itself stays in its file."""


@dataclass(frozen=True)
class Transfer:
    """Where an engine gets its weights from: each of its ranks joins the coordinator's transfers.

    address: the coordinator's, a path in a folder of this user alone; token_file: the run's token, in a file there;
    engine: this engine's number, from 0; ranks: how many send and receive in all; interface: the network device by
    which the others are reached.
    receiver: the function, by name, that starts the receiving end in the scheduler's process.
    """

    address: str
    token_file: str
    engine: int = 0
    ranks: tuple[int, int] = (1, 1)
    interface: str = "lo"
    receiver: str = "zerokl.weightsync.sglang_receiver.start"


@dataclass(frozen=True)
class EngineConfig:
    """One SGLang engine.

    context_length: most tokens of prompt and response together; max_running_requests: batch limit of decoding;
    max_total_tokens: slots of the KV cache; chunked_prefill_size: longest piece of a prompt in one forward pass;
    page_size: KV cache page (changes no bit); threads: CPU threads of the engine's arithmetic, shared by its ranks.
    tensor_parallel: ranks that share the model (changes no bit); segments: G of contract R2, into how many chains a
    row-parallel product is cut. It decides bits: the trainer's `Layout.segments` must be the same.
    architecture: one that the package does not know (see `alignment.architectures`).
    stock: SGLang's own kernels instead of zerokl's, for control measurements.
    capture_experts: return the experts every token went to with each generation (`alignment.routing_replay`).
    trace: be able to record what every op computes (`RolloutEngine.trace`), one request at a time.
    transfer: where new weights come from. Such an engine generates nothing before the first ones came.
    weight_loader: module with the functions ``digest``, ``flip_bit`` and ``trace`` SGLang calls by name.
    log_path: file for the engine's output; by default in a temporary folder that goes with the engine.
    disabled_hooks: hooks to leave out (`name`, or `name@rank` on one rank), a fault for tests: the engine must then
    refuse to start.
    """

    model_path: str
    architecture: Architecture | None = None
    stock: bool = False
    capture_experts: bool = False
    dtype: str = "bfloat16"
    context_length: int = 1024
    max_running_requests: int = 32
    max_total_tokens: int = 16384
    chunked_prefill_size: int = 512
    page_size: int = 1
    radix_cache: bool = True
    trace: bool = False
    tensor_parallel: int = 1
    segments: int = 1
    threads: int = 2
    transfer: Transfer | None = None
    weight_loader: str = "zerokl.weightsync.sglang_loader"
    log_path: str | None = None
    disabled_hooks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive = ("context_length", "max_running_requests", "max_total_tokens", "chunked_prefill_size", "threads")
        wrong = [f"{name}={getattr(self, name)}" for name in (*positive, "page_size") if getattr(self, name) < 1]
        if wrong:
            raise ValueError(f"must be at least 1: {', '.join(wrong)}")
        if self.dtype != "bfloat16":
            raise UnsupportedError(f"dtype {self.dtype!r} is not supported; supported: bfloat16")
        if self.transfer is not None and self.stock:
            raise UnsupportedError("transfer: needs zerokl's plugin (stock=False)")
        if self.trace and (self.stock or self.radix_cache):
            raise UnsupportedError("trace: needs zerokl's kernels (stock=False) and every token computed "
                                   "(radix_cache=False)")  # fmt: skip
        if problem := size_problem(self.tensor_parallel, self.segments):
            raise UnsupportedError(f"engine: {problem}")
        if self.tensor_parallel > 1 and self.trace:
            raise UnsupportedError("trace: needs one rank (tensor_parallel=1); bits are the same")
        if self.segments > 1 and self.stock:
            raise UnsupportedError("stock: SGLang's own kernels know no segments and run on one rank here")


@dataclass(frozen=True)
class ModelInfo:
    """What the checks need to know of a checkpoint; ``router`` None: it is dense."""

    architecture: Architecture
    vocab_size: int
    max_positions: int
    widths: Widths
    router: Router | None = None


def inspect_model(model_path: str, plugin: Architecture | None = None) -> ModelInfo:
    """Read and check a Hugging Face model folder without loading it; ``plugin``: one architecture more.

    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one and UnsupportedError for a
    model the kernels do not define.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {model_path!r} does not exist")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{model_path!r} is no Hugging Face model folder: config.json is missing")
    try:
        config = json.loads(config_file.read_text())
        info = ModelInfo(
            _architecture(str(config["architectures"][0]), plugin),
            int(config["vocab_size"]),
            int(config["max_position_embeddings"]),
            _widths(config),
            router_of(config),
        )
    except UnsupportedError:
        raise
    except RoutingError as error:
        raise UnsupportedError(f"{config_file}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{config_file} is damaged: {type(error).__name__}: {error}") from error
    _check_supported(info, config)
    _check_weights(folder)
    return info


def _widths(config: dict[str, Any]) -> Widths:
    heads = int(config["num_attention_heads"])
    experts = config.get("moe_intermediate_size")
    return Widths(
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        intermediate=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        experts=None if experts is None else int(experts),
    )


def _architecture(name: str, plugin: Architecture | None) -> Architecture:
    found = architectures.find(name, plugin)
    if found is None:
        raise UnsupportedError(f"architecture {name} is not supported; supported: {architectures.supported(plugin)}")
    return found


def _check_supported(info: ModelInfo, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    found = {
        f"rotary scaling {rope_type!r}": rope_type != "default",
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config") is not None,
        "sliding-window attention": bool(config.get("use_sliding_window")),
    }
    names = [name for name, present in found.items() if present] + info.architecture.unmet(config)
    if names:
        raise UnsupportedError(f"the model uses {', '.join(names)}, which zerokl's kernels do not define")


def _check_weights(folder: Path) -> None:
    """Open every safetensors file: its header states the file's length, so a truncated one fails here."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no *.safetensors weights")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or truncated ({error}); fetch or convert the model again") from error


def check_parallel(config: EngineConfig, model: ModelInfo) -> None:
    """Raise UnsupportedError for a model that segments or ranks do not divide."""
    problem = width_problem(
        model.widths,
        tensor=config.tensor_parallel,
        segments=config.segments,
        vocabulary_multiple=_VOCABULARY_MULTIPLE,
    )
    if problem is not None:
        raise UnsupportedError(f"engine: {problem}")


def check_requests(requests: Sequence[Request], config: EngineConfig, model: ModelInfo) -> None:
    """Raise ValueError, naming the request, for anything the engine could not serve exactly as asked."""
    if not requests:
        raise ValueError("no requests to generate for")
    limit = min(config.context_length, config.max_total_tokens)
    for index, request in enumerate(requests):
        prompt, sampling = len(request.input_ids), request.sampling
        if not prompt:
            raise ValueError(f"request {index} has an empty prompt")
        if prompt + sampling.max_new_tokens > limit:
            raise ValueError(
                f"request {index}: a prompt of {prompt} tokens plus max_new_tokens {sampling.max_new_tokens} exceeds "
                f"the {limit} tokens one request may hold (context_length {config.context_length}, "
                f"max_total_tokens {config.max_total_tokens}); shorten it or raise the limit"
            )
        foreign = next((token for token in request.input_ids if not 0 <= token < model.vocab_size), None)
        if foreign is not None:
            raise ValueError(f"request {index}: token id {foreign} is outside the vocabulary of {model.vocab_size}")
        problem = _sampling_problem(request)
        if problem:
            raise ValueError(f"request {index}: {problem}")


def _sampling_problem(request: Request) -> str:
    sampling = request.sampling
    problems = {
        f"max_new_tokens must be at least 1, got {sampling.max_new_tokens}": sampling.max_new_tokens < 1,
        f"temperature must be finite and not negative, got {sampling.temperature}": not 0 <= sampling.temperature < 1e9,
        f"top_p must be in (0, 1], got {sampling.top_p}": not 0 < sampling.top_p <= 1,
        f"top_k must be 0 (off) or above 1, got {sampling.top_k}; greedy is temperature 0": sampling.top_k < 0
        or sampling.top_k == 1,
        f"seed must fit a signed 64-bit integer, got {sampling.seed}": not -(2**63) <= sampling.seed < 2**63,
        f"arrival_s must be finite and not negative, got {request.arrival_s}": not 0 <= request.arrival_s < 1e9,
    }
    return "; ".join(text for text, wrong in problems.items() if wrong)
