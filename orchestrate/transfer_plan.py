"""`zerokl plan`: which weights would travel where, and how long that takes at given speeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from zerokl.orchestrate.errors import UserError
from zerokl.weightsync.known_shapes import SHAPES
from zerokl.weightsync.layout import LayoutError
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import ModelShape, read_shape
from zerokl.weightsync.plan import Plan, make_plan
from zerokl.weightsync.quantised import FORMS, receiving_layout, sending_layout
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.simulate import Links, predict

SHARED = {"ipc": True, "rdma": False, "collective": False, "disk": True}
"""Transport -> whether all ranks share its medium; otherwise each rank has a link of its own, both ways at once."""

MOST_ROUTES = 64
"""More than these are not printed; they are in the JSON."""

Sizes = TypeVar("Sizes", MegatronSizes, SglangSizes)


def run(
    model: Path | None,
    known: str,
    trainer: str,
    rollout: str,
    speeds: list[str],
    *,
    wire: str = "bf16",
    links: str = "",
) -> dict[str, Any]:
    """The plan as plain data, for a model folder or one of the ``known`` shapes. Raises UserError for options or
    splits that cannot be."""
    gb_per_s = dict(_speed(text) for text in speeds)
    if wire not in ("bf16", *FORMS):
        raise UserError(f"{wire!r} is not a wire form", f"forms are bf16, {', '.join(FORMS)}")
    try:
        shape = _shape(model, known)
        left = megatron_layout(shape, _sizes(trainer, MegatronSizes))
        right = sglang_layout(shape, _sizes(rollout, SglangSizes))
        item = {tensor.name: tensor.item_bytes for tensor in right.tensors}
        plain = sum(piece.box.elements * item[piece.tensor] for rank in right.ranks for piece in rank.pieces)
        if wire != "bf16":
            left, right = sending_layout(left, FORMS[wire]), receiving_layout(right, FORMS[wire])
        plan = make_plan(left, right)
    except LayoutError as error:
        raise UserError(
            str(error), "give a model folder and sizes that divide, e.g. --trainer tp=2 --rollout tp=2"
        ) from error
    result = {
        "digest": plan.digest,
        "wire": wire,
        "bytes": plan.nbytes,
        "bf16_bytes": plain,
        "model_bytes": sum(tensor.nbytes for tensor in left.tensors),
        "batches": len(plan.batches),
        "copies": sum(len(batch.copies) for batch in plan.batches),
        "routes": [
            {"trainer": source, "rollout": target, "bytes": size} for (source, target), size in plan.routes().items()
        ],
        "seconds": {name: plan.seconds(speed, shared=SHARED[name]) for name, speed in gb_per_s.items()},
    }
    if links:
        result["links"] = dataclasses.asdict(predict(plan, _links(links)))
    return result


def _shape(model: Path | None, known: str) -> ModelShape:
    if (model is None) == (not known):
        raise UserError(
            "there is no model to plan for, or there are two", "give either --model DIR or --model-shape NAME"
        )
    if model is not None:
        return read_shape(model)
    if known not in SHAPES:
        raise UserError(f"{known!r} is not a known shape", f"shapes are {', '.join(SHAPES)}")
    return SHAPES[known]


def lines(result: dict[str, Any]) -> list[str]:
    """The same for people."""
    text = []
    if len(result["routes"]) <= MOST_ROUTES:
        text.append(f"{'trainer rank':>12}  {'rollout rank':>12}  {'MB':>10}")
        text += [f"{r['trainer']:>12}  {r['rollout']:>12}  {r['bytes'] / 1e6:>10.1f}" for r in result["routes"]]
    text.append(
        f"{result['bytes'] / 1e6:.1f} MB in {result['batches']} batches of {result['copies']} copies; "
        f"the model has {result['model_bytes'] / 1e6:.1f} MB; plan {result['digest']}"
    )
    if result["wire"] != "bf16":
        saved = result["bf16_bytes"] - result["bytes"]
        text.append(f"{result['wire']}: {saved / 1e6:.1f} MB less than bf16 ({saved / result['bf16_bytes']:.0%} saved)")
    text += [f"{name}: {seconds:.3f} s predicted" for name, seconds in result["seconds"].items()]
    if "links" in result:
        found = result["links"]
        text.append(f"at least {found['seconds']:.3f} s on these links; the busiest is {found['bottleneck']}")
    return text


def _sizes(text: str, kind: type[Sizes]) -> Sizes:
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in known or not value.isdecimal() or int(value) < 1:
            raise UserError(f"{item!r} is not a size", f"write name=number, names are {', '.join(known)}")
        values[name] = int(value)
    return kind(**values)


def _speed(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        speed = float(value)
    except ValueError:
        speed = 0.0
    if name not in SHARED or not 0 < speed < float("inf"):
        raise UserError(f"{text!r} is not a speed", f"write transport=GB/s, transports are {', '.join(SHARED)}")
    return name, speed


def _links(text: str) -> Links:
    kinds: dict[str, type] = {name: type(value) for name, value in dataclasses.asdict(Links()).items()}
    values: dict[str, Any] = {}
    try:
        for item in text.split(","):
            name, _, value = item.partition("=")
            values[name] = {"1": True, "0": False}[value] if kinds[name] is bool else kinds[name](value)
        links = Links(**values)
        predict(Plan((), ""), links)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{text!r} are no links: {error}", f"write name=number, names are {', '.join(kinds)}"
        ) from error
    return links
