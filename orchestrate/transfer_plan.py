"""`zerokl plan`: which weights would travel where, and how long that takes at given speeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from zerokl.orchestrate.errors import UserError
from zerokl.weightsync.layout import LayoutError
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.model_shape import read_shape
from zerokl.weightsync.plan import make_plan
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout

SHARED = {"ipc": True, "rdma": False, "collective": False, "disk": True}
"""Transport -> whether all ranks share its medium; otherwise each rank has a link of its own, both ways at once."""

Sizes = TypeVar("Sizes", MegatronSizes, SglangSizes)


def run(model: Path, trainer: str, rollout: str, speeds: list[str]) -> dict[str, Any]:
    """The plan as plain data. Raises UserError for options or splits that cannot be."""
    gb_per_s = dict(_speed(text) for text in speeds)
    try:
        shape = read_shape(model)
        sides = (
            megatron_layout(shape, _sizes(trainer, MegatronSizes)),
            sglang_layout(shape, _sizes(rollout, SglangSizes)),
        )
        plan = make_plan(*sides)
    except LayoutError as error:
        raise UserError(
            str(error), "give a model folder and sizes that divide, e.g. --trainer tp=2 --rollout tp=2"
        ) from error
    return {
        "digest": plan.digest,
        "bytes": plan.nbytes,
        "model_bytes": sum(tensor.nbytes for tensor in sides[0].tensors),
        "batches": len(plan.batches),
        "copies": sum(len(batch.copies) for batch in plan.batches),
        "routes": [
            {"trainer": source, "rollout": target, "bytes": size} for (source, target), size in plan.routes().items()
        ],
        "seconds": {name: plan.seconds(speed, shared=SHARED[name]) for name, speed in gb_per_s.items()},
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The same for people."""
    text = [f"{'trainer rank':>12}  {'rollout rank':>12}  {'MB':>10}"]
    text += [f"{r['trainer']:>12}  {r['rollout']:>12}  {r['bytes'] / 1e6:>10.1f}" for r in result["routes"]]
    text.append(
        f"{result['bytes'] / 1e6:.1f} MB in {result['batches']} batches of {result['copies']} copies; "
        f"the model has {result['model_bytes'] / 1e6:.1f} MB; plan {result['digest']}"
    )
    return text + [f"{name}: {seconds:.3f} s predicted" for name, seconds in result["seconds"].items()]


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
