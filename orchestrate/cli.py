"""The command line. Exit codes: 0 fine, 1 a check or run failed, 2 bad input, 130 stopped by Ctrl-C.

Only this module turns errors into exit codes. Everything heavy is imported inside the commands, to keep `--help` quick.
"""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from zerokl.alignment.openmp import PASSIVE
from zerokl.orchestrate.errors import RunError, UserError

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Bit-exact RL post-training: rollout and training agree on every log-probability, bit for bit.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
model_app = typer.Typer(help="Fetch or make models.", no_args_is_help=True)
app.add_typer(model_app, name="model")


class Control(enum.StrEnum):
    stock = "stock"


class Replay(enum.StrEnum):
    off = "off"
    on = "on"
    check = "check"


class Fault(enum.StrEnum):
    ulp = "ulp"
    nan = "nan"
    weight_bit = "weight-bit"
    routing_slots = "routing-slots"
    tie_break = "tie-break"
    combine_order = "combine-order"
    stale_bias = "stale-bias"
    replay_shift = "replay-shift"


class SyncFaults(enum.StrEnum):
    none = "none"
    random = "random"


class Side(enum.StrEnum):
    rollout = "rollout"
    trainer = "trainer"


class Family(enum.StrEnum):
    llama = "llama"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    qwen3_moe = "qwen3_moe"
    glm4_moe = "glm4_moe"


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="A known name (smollm2-135m) or a Hugging Face model folder.")],
    architecture: Annotated[
        str | None, typer.Option(help="One more architecture: package.module.SPEC or file.py:SPEC.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines: prompt (text or messages) or input_ids.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample for each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 samples greedily.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides every sampled token.")] = 0,
    control: Annotated[Control | None, typer.Option(help="Run the engines' own kernels instead.")] = None,
    replay: Annotated[Replay, typer.Option(help="Train along the rollout's choice of experts.")] = Replay.off,
    segments: Annotated[int, typer.Option(help="Cut row-parallel products so, in both engines: 1, 2, 4, 8.")] = 1,
    rollout_tensor_parallel: Annotated[int, typer.Option(help="Ranks that share SGLang's model: 1, 2, 4, 8.")] = 1,
    inject: Annotated[Fault | None, typer.Option(help="Plant one fault, which must be found.")] = None,
    syncs: Annotated[int, typer.Option(min=0, help="Before: train a step and send the weights, so often.")] = 0,
    transport: Annotated[str, typer.Option(help="How these weights travel (docs/cli.md); default: chosen.")] = "auto",
    faults: Annotated[SyncFaults, typer.Option(help="Faults during these transfers, drawn from the seed.")] = (
        SyncFaults.none
    ),
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Sample with SGLang, score with Megatron-Core, compare every log-probability as bits."""
    from zerokl.orchestrate import files
    from zerokl.orchestrate import verify as command

    if json is not None:
        files.check_writable(json)
    settings = command.Settings(
        model=model,
        architecture=architecture,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stock=control is not None,
        replay=replay.value,
        segments=segments,
        rollout_tensor_parallel=rollout_tensor_parallel,
        inject=inject.value if inject else None,
        syncs=syncs,
        transport=transport,
        sync_faults=faults is SyncFaults.random,
    )
    result = command.run(settings, say=_say)
    if json is not None:
        files.write_json(json, result)
    for line in command.lines(result):
        typer.echo(line)
    raise typer.Exit(0 if result["equal"] else FAILED)


@app.command()
def trace(
    model: Annotated[str, typer.Option(help="A known name (smollm2-135m) or a Hugging Face model folder.")],
    architecture: Annotated[
        str | None, typer.Option(help="One more architecture: package.module.SPEC or file.py:SPEC.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    input_ids: Annotated[str | None, typer.Option(help="The same as token ids: 5,6,7.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="The same from a file, as for `zerokl verify`.")] = None,
    request: Annotated[int, typer.Option(min=0, help="Which prompt of the file, or of the built-in ones.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 samples greedily.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides every sampled token.")] = 0,
    segments: Annotated[int, typer.Option(help="Cut row-parallel products so, in both engines: 1, 2, 4, 8.")] = 1,
    inject_op: Annotated[str | None, typer.Option(help="Plant one ULP in an op: name, or name:call.")] = None,
    inject_layer: Annotated[int | None, typer.Option(help="In this layer; default: outside the layers.")] = None,
    inject_token: Annotated[int, typer.Option(min=0, help="For the token at this position.")] = 0,
    inject_element: Annotated[int, typer.Option(min=0, help="In this element of its row.")] = 0,
    inject_side: Annotated[Side, typer.Option(help="On this side.")] = Side.trainer,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Run one request through both engines, compare every op's output, name the first difference."""
    from zerokl.orchestrate import files, verify
    from zerokl.orchestrate import trace as command

    if json is not None:
        files.check_writable(json)
    settings = command.Settings(
        verify=verify.Settings(
            model, architecture, prompts, max_new_tokens, temperature, top_p, seed, segments=segments
        ),
        task=command.task(prompt, input_ids, prompts, request),
        request=request,
        plant=command.plant(inject_op, inject_layer, inject_token, inject_element),
        side=inject_side.value,
    )
    result = command.run(settings, say=_say)
    if json is not None:
        files.write_json(json, result)
    for line in command.lines(result):
        typer.echo(line)
    raise typer.Exit(0 if result["equal"] else FAILED)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, e.g. recipes/demo.toml.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Replace one value: table.key=value.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the resolved recipe.")] = False,
) -> None:
    """Train with GRPO: SGLang samples, Megatron-Core trains, Ray holds them together."""
    from zerokl.orchestrate.config import load
    from zerokl.orchestrate.preflight import prepare

    config = load(recipe, set_ or [])
    prepared = prepare(config, recipe.resolve().parent)
    if dry_run:
        from zerokl.orchestrate.run_folder import to_toml

        typer.echo(to_toml(prepared.config), nl=False)
        return
    from zerokl.orchestrate.loop import train as run

    raise typer.Exit(0 if run(prepared, resume=resume) else INTERRUPTED)


@app.command()
def plan(
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face model folder; only its config.json is read.")
    ] = None,
    model_shape: Annotated[str, typer.Option(help="Instead of a folder: kimi-k2 or deepseek-v3.")] = "",
    trainer: Annotated[
        str, typer.Option(help="Megatron's sizes: tp, pp, ep, dp, etp, vocabulary_multiple, last_stage.")
    ] = "",
    rollout: Annotated[str, typer.Option(help="SGLang's sizes: tp, ep, engines, mlp_tp.")] = "",
    wire: Annotated[
        str, typer.Option(help="What travels: bf16, fp8_block[_hopper|_blackwell], mxfp8, int4_group32, int4_group128.")
    ] = "bf16",
    links: Annotated[str, typer.Option(help="GB/s per direction, e.g. nic=50,nvlink=450 (docs/weightsync.md).")] = "",
    speed: Annotated[list[str] | None, typer.Option(help="transport=GB/s, e.g. ipc=10; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Show which weights would travel from which trainer rank to which rollout rank, and predict how long."""
    from zerokl.orchestrate import files, transfer_plan

    if json is not None:
        files.check_writable(json)
    result = transfer_plan.run(model, model_shape, trainer, rollout, speed or [], wire=wire, links=links)
    if json is not None:
        files.write_json(json, result)
    for line in transfer_plan.lines(result):
        typer.echo(line)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Make report.html and report.png again from what a run recorded."""
    from zerokl.orchestrate import report as command

    for path in command.write(run_dir):
        typer.echo(path)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has, what is missing, and the command that fixes it."""
    from zerokl.orchestrate import doctor as command

    facts, problems = command.examine()
    typer.echo(command.to_json(facts) if json else "\n".join(command.lines(facts, problems)))
    raise typer.Exit(0 if facts["runnable"] else FAILED)


@model_app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="A known name: smollm2-135m.")],
    out: Annotated[Path | None, typer.Option(help="Where to put it; default: the model cache.")] = None,
) -> None:
    """Make a known model's folder (a second run verifies it)."""
    from zerokl.orchestrate import models

    typer.echo(models.fetch(name, out))


@model_app.command("tiny")
def tiny(
    family: Annotated[Family, typer.Argument(help="The architecture.")],
    out: Annotated[Path, typer.Option(help="Where to put it.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
) -> None:
    """Make a tiny random model, for tests and first steps."""
    from zerokl.orchestrate import models

    typer.echo(models.tiny(family.value, out, seed=seed))


def main() -> NoReturn:
    """The `zerokl` command."""
    os.environ.update(PASSIVE | os.environ)  # torch is not loaded yet; actors and engines inherit it
    try:
        app(standalone_mode=True)
    except UserError as error:
        _fail(error, USAGE)
    except RunError as error:
        _fail(error, FAILED)
    except KeyboardInterrupt:
        _fail("stopped", INTERRUPTED)
    sys.exit(0)


def _fail(error: object, code: int) -> NoReturn:
    typer.echo(f"zerokl: {error}", err=True)
    sys.exit(code)


def _say(text: str) -> None:
    typer.echo(text, err=True)
