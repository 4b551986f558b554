"""`zerokl verify`: SGLang samples, Megatron-Core's training forward scores the same tokens, bits are compared."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import shlex
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerokl.alignment.megatron.model_config import ModelConfig, ModelError
from zerokl.alignment.mismatch import gap
from zerokl.alignment.routing_replay import Mode
from zerokl.alignment.sglang.errors import EngineError, HookError, UnsupportedError
from zerokl.alignment.types import Request, SamplingParams
from zerokl.alignment.verify import Mismatch, compare
from zerokl.orchestrate import builtin_prompts, faults, manifest, models, sync_runs
from zerokl.orchestrate.actors import cores
from zerokl.orchestrate.callables import load_architecture
from zerokl.orchestrate.data import Task, read_jsonl
from zerokl.orchestrate.errors import RunError, UserError
from zerokl.orchestrate.preflight import check_transport
from zerokl.orchestrate.samples import sampling_seed
from zerokl.orchestrate.scoring import score
from zerokl.orchestrate.tokens import Tokenizer
from zerokl.orchestrate.weights import Meeting, WeightLink
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.live_model import block_layout
from zerokl.weightsync.topology import AUTO, Unfit

if TYPE_CHECKING:
    from zerokl.alignment.architectures import Architecture
    from zerokl.alignment.megatron.policy import MegatronPolicy
    from zerokl.alignment.sglang.engine import RolloutEngine

CHUNK = 256  # prefill chunk: the built-in prompts hold a longer one
START_TIMEOUT_S = 300.0
GENERATE_TIMEOUT_S = 1800.0
_EXTREMES = 3  # printed; the JSON file holds more


@dataclass(frozen=True)
class Settings:
    """The command's options; ``architecture``: the name of one the package does not know, ``stock``: the engines' own
    kernels, ``replay``: see `alignment.routing_replay`, ``segments``: of contract R2, in both engines,
    ``rollout_tensor_parallel``: ranks of the rollout engine, ``inject``: one planted fault, ``syncs``: how often the
    policy is trained and sent to the engine before (`sync_runs`) by ``transport``, with ``sync_faults``."""

    model: str
    architecture: str | None = None
    prompts: Path | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stock: bool = False
    replay: Mode = "off"
    segments: int = 1
    rollout_tensor_parallel: int = 1
    inject: faults.Fault | None = None
    syncs: int = 0
    transport: str = AUTO
    sync_faults: bool = False


def run(settings: Settings, *, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole verification; returns what the JSON file holds. ``equal`` in it is the verdict.

    Raises UserError for bad input and RunError where an engine fails or misses its deadline.
    """
    try:
        return _run(settings, say)
    except (UnsupportedError, ModelError) as error:
        raise UserError(str(error)) from error
    except Unfit as unfit:
        raise UserError(unfit.cause, unfit.remedy) from unfit
    except WeightSyncError as error:
        raise RunError(str(error)) from error
    except (EngineError, HookError, TimeoutError) as error:
        raise RunError(f"the rollout engine failed: {error}") from error


def _run(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    architecture = load_architecture(settings.architecture, Path.cwd()) if settings.architecture else None
    folder, requests = make_requests(settings, architecture=architecture)
    say(f"{folder.name}: {len(requests)} prompts, {sum(len(r.input_ids) for r in requests)} prompt tokens")
    with contextlib.ExitStack() as stack:
        meeting = None
        if settings.syncs or settings.inject == "tie-break":  # the one fault that changes the weights of both sides
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zerokl-")))
            meeting = Meeting.in_folder(
                scratch, transport=settings.transport, receivers=settings.rollout_tensor_parallel
            )
        engine, policy = start(
            folder, requests, architecture, stock=settings.stock, replay=settings.replay, segments=settings.segments,
            tensor_parallel=settings.rollout_tensor_parallel, meeting=meeting, trained=settings.syncs > 0,
        )  # fmt: skip
        sync, rounds = None, []
        if settings.syncs:
            assert meeting is not None
            faulty = settings.sync_faults
            runs = stack.enter_context(sync_runs.SyncRuns(meeting, engine, policy, requests, faults=faulty))
            rounds = sync_runs.run(runs, settings.syncs, settings.seed, say=say)
            engine = runs.engine  # it may be another one by now
        else:
            stack.enter_context(engine)
        if meeting is not None and not settings.syncs:
            link = stack.enter_context(connect(meeting, policy))
            sync = functools.partial(link.sync, "ties", timeout_s=START_TIMEOUT_S)
        faults.plant(settings.inject, engine, policy, sync)
        generations = engine.generate(requests, timeout_s=GENERATE_TIMEOUT_S)
        theirs = policy.weights_digest(settings.rollout_tensor_parallel)
        digests = engine.weights_digest(timeout_s=START_TIMEOUT_S), theirs
        engine_manifest = engine.manifest()
    say(f"sampled {sum(len(g.output_ids) for g in generations)} tokens; scoring them in the training forward")
    generations = faults.damage_records(settings.inject, generations)
    scored, observed = score(policy, requests, generations), manifest.Observed()
    differing = policy.differing_tokens
    with observed:  # once more for one request, to see which ops its forward runs
        score(policy, requests[:1], generations[:1])
    faults.damage_scores(settings.inject, scored)
    found = compare(generations, scored)
    engine_digest, trainer_digest = (_one_digest(side) for side in digests)
    equal = found.equal and engine_digest == trainer_digest and differing == 0 and all(row.ok for row in rounds)
    return {
        "equal": equal,
        **found.to_json(),
        "gap": None if found.equal else gap(generations, scored).to_dict(),
        "routing": {"replay": settings.replay, "differing_tokens": differing if settings.replay == "check" else None},
        "weights_digest": {"engine": engine_digest, "trainer": trainer_digest},
        "trace": None if equal or settings.stock else trace_command(settings, found.first_mismatch),
        "syncs": sync_runs.to_json(rounds),
        "requests": len(requests),
        "longest_prompt": max(len(r.input_ids) for r in requests),
        "cached_tokens": sum(g.cached_tokens for g in generations),
        "manifest": manifest.build(engine_manifest, policy.manifest(), observed),
        "versions": manifest.versions(),
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The verdict for people."""
    kl, first = result["kl"], result["first_mismatch"]
    out = [
        f"tokens            {result['tokens']}",
        f"mismatched tokens {result['mismatched_tokens']}",
        f"not finite        {result['nonfinite']}",
        f"max |difference|  {result['max_abs_diff']}",
        f"KL k1, k2, k3     {kl['k1']}, {kl['k2']}, {kl['k3']}",
        f"weights           engine {result['weights_digest']['engine']}, trainer {result['weights_digest']['trainer']}",
    ]
    if result["syncs"]:
        bad = [row["number"] for row in result["syncs"] if not row["ok"]]
        out.append(
            f"weight transfers  {len(result['syncs'])} rounds, " + (f"NOT ALL WELL: {bad}" if bad else "all well")
        )
    if result["routing"]["differing_tokens"] is not None:
        out.append(f"routed otherwise  {result['routing']['differing_tokens']} tokens")
    if result["gap"]:
        out += _gap_lines(result["gap"])
    if first:
        out.append(
            f"first mismatch    request {first['request']}, generated token {first['position']} (id {first['token']}): "
            f"rollout {first['rollout']}, trainer {first['trainer']}"
        )
    out.append("EQUAL, bit for bit" if result["equal"] else "NOT EQUAL")
    if result["trace"]:
        out.append(f"to see where it begins: {result['trace']}")
    return out


def _gap_lines(gap: dict[str, Any]) -> list[str]:
    """How far apart the two policies are, and on which tokens most; null: a log-probability is not finite."""
    return [
        f"perplexity        rollout {gap['perplexity_rollout']}, trainer {gap['perplexity_trainer']}",
        f"effective samples {gap['ess_tokens']} of the tokens, {gap['ess_sequences']} of the responses",
        *(
            f"far apart         request {t['sample']}, generated token {t['position']} (id {t['token']}): "
            f"rollout {t['rollout']}, trainer {t['trainer']}"
            for t in gap["extremes"][:_EXTREMES]
        ),
    ]


def trace_command(settings: Settings, mismatch: Mismatch | None) -> str:
    """The `zerokl trace` of the first request that differs (the first of all where only weights or routing do).

    A planted fault is not part of it.
    """
    options = {
        "model": settings.model, "architecture": settings.architecture, "prompts": settings.prompts,
        "request": mismatch.request if mismatch else 0, "max-new-tokens": settings.max_new_tokens,
        "temperature": settings.temperature, "top-p": settings.top_p, "seed": settings.seed,
        "segments": settings.segments if settings.segments > 1 else None,
    }  # fmt: skip
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["zerokl", "trace", *words])


def make_requests(
    settings: Settings, tasks: Sequence[Task] | None = None, *, architecture: Architecture | None = None
) -> tuple[Path, list[Request]]:
    """The model's folder and the requests: of ``tasks``, else of the prompts file, else the built-in ones.

    Raises UserError for anything that could not be served.
    """
    if not (math.isfinite(settings.temperature) and 0 < settings.top_p <= 1):
        raise UserError(f"cannot sample with temperature {settings.temperature}, top-p {settings.top_p}",
                        "temperature: finite, at least 0; top-p: above 0, at most 1")  # fmt: skip
    folder = models.resolve(settings.model, architecture)
    config = models.check(folder, architecture)
    _check_moe(settings, config)
    ranks = settings.rollout_tensor_parallel
    faults.check(settings.inject, config, settings.replay, stock=settings.stock, ranks=ranks)
    tokenizer = Tokenizer(folder, config.vocab_size)
    if settings.syncs and settings.stock:
        raise UserError("--syncs: stock engines take no new weights", "leave out --control stock")
    _check_transfers(settings)
    longest = config.max_position_embeddings - settings.max_new_tokens
    if longest < 1:
        raise UserError(
            f"--max-new-tokens {settings.max_new_tokens} leaves no room in the model's "
            f"{config.max_position_embeddings} positions", "lower it"
        )  # fmt: skip
    if tasks is None and settings.prompts is not None:
        tasks = read_jsonl(settings.prompts)
    own = tasks is None
    if tasks is None:
        prompts = builtin_prompts.make(tokenizer, longest=longest)
    else:
        prompts = [(tokenizer.encode(t, template=None, longest=longest), 0.0) for t in tasks]
    return folder, [
        Request(
            ids,
            SamplingParams(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=sampling_seed(settings.seed, 0, index),
                stop_token_ids=tokenizer.end,
                ignore_eos=own,  # a fixed number of tokens to compare
            ),
            arrival,
        )
        for index, (ids, arrival) in enumerate(prompts)
    ]


def _check_transfers(settings: Settings) -> None:
    if not settings.syncs and (settings.sync_faults or settings.transport != AUTO):
        raise UserError("--faults, --transport: there is no transfer", "add --syncs N")
    if settings.sync_faults and settings.transport not in (AUTO, "ipc"):
        raise UserError(f"--faults damages transfers by ipc, not by {settings.transport}", "leave out --transport")
    check_transport(settings.transport)


def _check_moe(settings: Settings, config: ModelConfig) -> None:
    if settings.replay != "off" and config.moe is None:
        raise UserError(
            f"--replay {settings.replay}: {config.architecture} is dense, it routes nothing", "leave it out"
        )


def start(
    folder: Path,
    requests: Sequence[Request],
    architecture: Architecture | None = None,
    *,
    stock: bool = False,
    replay: Mode = "off",
    trace: bool = False,
    segments: int = 1,
    tensor_parallel: int = 1,
    meeting: Meeting | None = None,
    trained: bool = False,
) -> tuple[RolloutEngine, MegatronPolicy]:
    """The engine (a child process) and the policy (here), started side by side; ``trace``: ready to record.

    ``tensor_parallel``: ranks of the engine; ``segments``: of both. ``meeting``: the engine waits for its weights there
    (`connect`) and samples nothing before. ``trained``: the policy can take optimizer steps.
    """
    from zerokl.alignment.megatron.layout import Layout
    from zerokl.alignment.megatron.optimizer import OptimizerSettings
    from zerokl.alignment.megatron.policy import MegatronPolicy
    from zerokl.alignment.sglang.engine import EngineConfig, RolloutEngine

    longest = max(len(r.input_ids) + r.sampling.max_new_tokens for r in requests)
    config = EngineConfig(
        model_path=str(folder),
        architecture=architecture,
        stock=stock,
        capture_experts=replay != "off",
        radix_cache=not trace,  # every token is to be computed
        trace=trace,
        context_length=longest,
        max_total_tokens=max(16384, 2 * longest),
        chunked_prefill_size=CHUNK,
        segments=segments,
        tensor_parallel=tensor_parallel,
        threads=cores(None),
        transfer=None if meeting is None else meeting.transfer(),
    )
    optimizer = OptimizerSettings(learning_rate=1e-4)
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(RolloutEngine, config, start_timeout_s=START_TIMEOUT_S)
        try:
            policy = MegatronPolicy(
                folder,
                architecture=architecture,
                optimizer=optimizer if trained else None,
                stock=stock,
                replay=replay,
                threads=cores(None),
                layout=Layout(segments=segments),
            )
        except BaseException:
            if starting.exception() is None:
                starting.result().close()
            raise
        return starting.result(), policy


def connect(meeting: Meeting, policy: MegatronPolicy) -> WeightLink:
    """The policy's side of the transfers to the engine of ``meeting``."""
    return WeightLink(meeting, *block_layout(*policy.weight_blocks()))


def _one_digest(side: dict[str, str]) -> str:
    """One digest for a whole model: over names and digests of its tensors, sorted by name."""
    if not side:
        raise RunError("a side reported no weights")
    return hashlib.sha256("\n".join(f"{name} {side[name]}" for name in sorted(side)).encode()).hexdigest()
