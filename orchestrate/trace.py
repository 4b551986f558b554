"""`zerokl trace`: one request through both engines, every op's output compared in order, the first difference named."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zerokl.alignment.architectures import Architecture
from zerokl.alignment.megatron.model_config import ModelError
from zerokl.alignment.recorder import EXPERT_SILU, OPS, Plant
from zerokl.alignment.sglang.errors import EngineError, HookError, UnsupportedError
from zerokl.alignment.trace import Difference, Step, Trace, TraceError, first_difference, read
from zerokl.alignment.types import PackedBatch, Request
from zerokl.orchestrate import models, verify
from zerokl.orchestrate.callables import load_architecture
from zerokl.orchestrate.data import Task
from zerokl.orchestrate.errors import RunError, UserError

Side = Literal["rollout", "trainer"]

_HINTS = {
    "embedding": "the token ids, and the embedding's weights",
    "rms_norm": "the norm's weight and epsilon",
    "linear": "the weight and bias, their layout (fused parts, order of columns), and out_dtype",
    "rotary": "the positions, the table (theta, scaling), and which dimensions are paired",
    "attention": "the cache (page table, slots written twice or not at all), the scale, the window, the head counts",
    "silu_and_mul": "the order of gate and up columns",
    EXPERT_SILU: "the order of gate and up columns in the experts' weights",
    "router_topk": "the router's options: scoring, selection bias, groups, ties, renormalisation, scale",
    "moe_gather": "the order of rows by expert, token and slot",
    "grouped_linear": "the experts' weights and offsets",
    "moe_combine": "the order of slots, and the shared expert's output",
    "logprob": "temperature, top-p and top-k, the target, and the size of the vocabulary",
}


@dataclass(frozen=True)
class Settings:
    """The command's options: ``verify`` holds those it shares, ``task`` the prompt given here (None: ``request`` counts
    the prompts `zerokl verify` would take), ``plant`` a fault on ``side``."""

    verify: verify.Settings
    task: Task | None = None
    request: int = 0
    plant: Plant | None = None
    side: Side = "trainer"


def task(prompt: str | None, input_ids: str | None, prompts: Path | None, request: int) -> Task | None:
    """The one prompt given by an option, if any. Raises UserError for two of them, or ids that are no numbers."""
    options = {"--prompt": prompt, "--input-ids": input_ids, "--prompts": prompts}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1 or (request and given not in ([], ["--prompts"])):
        raise UserError(f"{', '.join(given)}{' and --request' if request else ''}: one prompt at a time", "give one")
    if input_ids is not None:
        words = input_ids.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise UserError(f"--input-ids {input_ids!r}: not token ids", "write them as 5,6,7")
        return Task(0, None, tuple(map(int, words)), where="--input-ids")
    return None if prompt is None else Task(0, prompt, where="--prompt")


def plant(op: str | None, layer: int | None, token: int, element: int) -> Plant | None:
    """The fault to plant; ``op`` is a name, or a name with the number of its call in the layer: `linear:2`."""
    if op is None:
        return None
    name, _, call = op.partition(":")
    if name not in OPS or not (call or "0").isdecimal():
        raise UserError(f"--inject-op: no op is called {op!r}", f"known, with :N for a later call: {', '.join(OPS)}")
    return Plant(name, layer, token, int(call or 0), element)


def run(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole trace; returns what the JSON file holds. ``equal`` in it is the verdict.

    Raises UserError for bad input and RunError where an engine fails or the recordings cannot be compared.
    """
    try:
        return _run(settings, say)
    except (UnsupportedError, ModelError) as error:
        raise UserError(str(error)) from error
    except TraceError as error:
        raise RunError(f"nothing to compare: {error}") from error
    except (EngineError, HookError, TimeoutError) as error:
        raise RunError(f"the rollout engine failed: {error}") from error


def _run(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    name = settings.verify.architecture
    architecture = load_architecture(name, Path.cwd()) if name else None
    folder, request = _request(settings, architecture)
    say(f"{folder.name}: one request of {len(request.input_ids)} prompt tokens")
    with tempfile.TemporaryDirectory(prefix="zerokl-trace-") as place:
        rollout, trainer, digests, generated = _record(folder, request, settings, architecture, Path(place))
        if settings.plant is not None:
            _check_planted(settings.plant, trainer)
        say(f"recorded {len(rollout)} outputs of ops for {len(request.input_ids) + generated - 1} tokens on both sides")
        found = first_difference(rollout, trainer)
    weights = sorted(
        name for name in digests[0].keys() | digests[1].keys() if digests[0].get(name) != digests[1].get(name)
    )
    return {
        "equal": found is None and not weights,
        "compared": len(rollout),
        "prompt_tokens": len(request.input_ids),
        "generated_tokens": generated,
        "differing_weights": weights,
        "first_difference": None if found is None else _plain(found),
        "hint": hint(found, weights),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The verdict for people."""
    out = [
        f"outputs of ops    {result['compared']}",
        f"tokens            {result['prompt_tokens']} of the prompt, {result['generated_tokens']} generated",
        f"differing weights {len(result['differing_weights'])}",
    ]
    first = result["first_difference"]
    if first:
        out += [
            f"first difference  {Step(**first['step'])}: token {first['token']}, element {first['element']} of "
            f"{first['width']}",
            *(f"  {side:<15} {_side(first[side])}" for side in ("rollout", "trainer")),
            f"                  {first['differing']} elements of this output differ, over all tokens",
        ]
    out.append(f"look at           {result['hint']}")
    return [*out, "EQUAL, op for op" if result["equal"] else "NOT EQUAL"]


def hint(found: Difference | None, weights: list[str]) -> str:
    """What to look at, given the first difference and the weights whose digests differ."""
    if weights:
        return f"the weight synchronisation: {', '.join(weights[:4])} differ before anything is computed"
    if found is None:
        return ("nothing here. If `zerokl verify` differed: what this request shared there, its batch and the "
                "prefix cache, which a trace leaves out")  # fmt: skip
    if found.step.output == "sum":
        return "what runs between the ops: the residual addition before this norm, and what reaches it"
    same = "" if found.rollout.bits != found.trainer.bits else "why the value is not finite, on both sides; then "
    return f"{same}{_HINTS[found.step.op]}; every earlier output is equal, so this op's own inputs are"


def _plain(found: Difference) -> dict[str, Any]:
    """The difference as JSON values: a number that is not finite becomes null."""
    plain = asdict(found) | {"step": found.step._asdict()}
    for value in (plain["rollout"], plain["trainer"]):
        value["number"] = value["number"] if math.isfinite(value["number"]) else None
    return plain


def _side(value: dict[str, Any]) -> str:
    number = "not finite" if value["number"] is None else repr(value["number"])
    return f"{value['bits']} ({number}) by {value['op']} in {value['module'] or 'the head'}"


def _request(settings: Settings, architecture: Architecture | None) -> tuple[Path, Request]:
    tasks = None if settings.task is None else [settings.task]
    folder, requests = verify.make_requests(settings.verify, tasks, architecture=architecture)
    if not 0 <= settings.request < len(requests):
        raise UserError(f"--request {settings.request}: there are {len(requests)} prompts, counted from 0")
    request = requests[settings.request]
    plant = settings.plant
    if plant is not None:
        layers, last = (
            models.check(folder, architecture).num_hidden_layers,
            len(request.input_ids) + request.sampling.max_new_tokens - 2,
        )
        if plant.layer is not None and not 0 <= plant.layer < layers:
            raise UserError(f"--inject-layer {plant.layer}: the model has {layers} layers, counted from 0")
        if not 0 <= plant.token <= last:
            raise UserError(f"--inject-token {plant.token}: tokens are counted from 0 to {last} at most")
    return folder, Request(request.input_ids, request.sampling)


def _record(
    folder: Path, request: Request, settings: Settings, architecture: Architecture | None, place: Path
) -> tuple[Trace, Trace, tuple[dict[str, str], dict[str, str]], int]:
    """Both recordings, both sides' weight digests, and the number of tokens sampled."""
    from zerokl.alignment.megatron import tracing

    for side in ("rollout", "trainer"):
        (place / side).mkdir()
    plants = {settings.side: settings.plant}
    engine, policy = verify.start(folder, [request], architecture, trace=True, segments=settings.verify.segments)
    with engine:
        engine.trace(place / "rollout", plants.get("rollout"), timeout_s=verify.START_TIMEOUT_S)
        generations = engine.generate([request], timeout_s=verify.GENERATE_TIMEOUT_S)
        digests = engine.weights_digest(timeout_s=verify.START_TIMEOUT_S), policy.weights_digest()
    tracing.record(policy, PackedBatch.pack([request], generations), place / "trainer", plants.get("trainer"))
    return read(place / "rollout"), read(place / "trainer"), digests, len(generations[0].output_ids)


def _check_planted(plant: Plant, trace: Trace) -> None:
    """Raise UserError, with the ops there are, unless the planted fault had a place."""
    here = [step for step in trace if step.layer == plant.layer]
    found = [step for step in here if (step.op, step.call) == (plant.op, plant.call)]
    if not found:
        names = dict.fromkeys(f"{step.op}:{step.call}" for step in here)
        where = "outside the layers" if plant.layer is None else f"in layer {plant.layer}"
        raise UserError(f"--inject-op {plant.op}:{plant.call} does not run {where}", f"what runs: {', '.join(names)}")
    tokens = {int(token) for record in trace[found[0]] for token in record.positions}
    width = trace[found[-1]][0].values.shape[1]
    if plant.element >= width:
        raise UserError(f"--inject-element {plant.element}: a row of {plant.op} has {width}, counted from 0")
    if plant.token not in tokens:
        raise UserError(f"--inject-token {plant.token}: {plant.op} computes tokens {min(tokens)} to {max(tokens)}")
