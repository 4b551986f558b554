"""Two recordings of one sequence, by rollout and by trainer, and the first element in which they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.int64: torch.int64}
HEAD = ((None, "linear"), (None, "logprob"))
"""(layer, op) of the output head: a rollout also runs it for prompt tokens that nothing is sampled after."""


class TraceError(ValueError):
    """Two recordings that cannot be compared, or an op that cannot be recorded. The message names it."""


class Step(NamedTuple):
    """One output of one op: the ``call``-th (from 0) of this op in this layer (from 0; None: outside the layers)."""

    layer: int | None
    op: str
    call: int
    output: str

    def __str__(self) -> str:
        where = "outside the layers" if self.layer is None else f"layer {self.layer}"
        return f"{where}, {self.op}:{self.call}, {self.output}"


class Record(NamedTuple):
    """A step in one forward pass: values [n, width] of the tokens at positions int64 [n]; ``ran``: the op's own name;
    ``module``: the engine's module that called it."""

    positions: torch.Tensor
    values: torch.Tensor
    ran: str
    module: str


Trace = dict[Step, list[Record]]
"""Every step with its records, in the order of execution."""


@dataclass(frozen=True)
class Value:
    """One side of a difference: the number, its bits in hexadecimal, the op and the module that computed it."""

    number: float
    bits: str
    op: str
    module: str


@dataclass(frozen=True)
class Difference:
    """The first differing element: its step, its token's absolute position, its place in the token's row of ``width``,
    both values, and how many of the step's elements differ in all."""

    step: Step
    token: int
    element: int
    width: int
    rollout: Value
    trainer: Value
    differing: int


def read(folder: str | Path) -> Trace:
    """What a `recorder.Recorder` wrote into ``folder``. Raises TraceError where it wrote nothing."""
    trace: Trace = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            rows = {False: file.get_tensor("positions"), True: file.get_tensor("scored")}
            for index, entry in enumerate(json.loads(file.metadata()["steps"])):
                step = Step(entry["layer"], entry["op"], entry["call"], entry["output"])
                positions = rows[(step.layer, step.op) in HEAD]
                record = Record(positions, file.get_tensor(str(index)), entry["ran"], entry["module"])
                trace.setdefault(step, []).append(record)
    if not trace:
        raise TraceError(f"{folder} holds no recording: no op of zerokl ran")
    return trace


def first_difference(rollout: Trace, trainer: Trace) -> Difference | None:
    """The first element whose bits differ or that is not finite: by step in the rollout's order, token, element.

    Raises TraceError where a side lacks a step or a token, has a token twice, or computes other widths or dtypes.
    """
    if lacking := [*(f"the trainer lacks {s}" for s in rollout if s not in trainer),
                   *(f"the rollout lacks {s}" for s in trainer if s not in rollout)]:  # fmt: skip
        raise TraceError(f"the two sides run different ops: {'; '.join(lacking[:4])}")
    for step, records in rollout.items():
        found = _compare(step, records, trainer[step])
        if found is not None:
            return found
    return None


def _compare(step: Step, rollout: Sequence[Record], trainer: Sequence[Record]) -> Difference | None:
    ours, a = _by_position(step, rollout, "rollout")
    theirs, b = _by_position(step, trainer, "trainer")
    if (step.layer, step.op) in HEAD:
        wanted = torch.isin(ours, theirs)
        ours, a = ours[wanted], a[wanted]
    if not torch.equal(ours, theirs):
        odd = sorted(set(ours.tolist()) ^ set(theirs.tolist()))
        raise TraceError(f"{step}: only one side has the tokens at {odd[:8]}")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise TraceError(
            f"{step}: {a.dtype} of width {a.shape[1]} in the rollout, {b.dtype} of {b.shape[1]} in the trainer"
        )
    different = _bits(a) != _bits(b)
    if a.dtype.is_floating_point:
        different |= ~(torch.isfinite(a) & torch.isfinite(b))
    where = torch.nonzero(different)
    if where.numel() == 0:
        return None
    row, element = where[0].tolist()
    token = int(ours[row])
    return Difference(
        step, token, element, a.shape[1],
        _value(a[row, element], rollout, token), _value(b[row, element], trainer, token), len(where),
    )  # fmt: skip


def _by_position(step: Step, records: Sequence[Record], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All passes' rows as one, ascending by absolute position."""
    positions, order = torch.cat([record.positions for record in records]).sort(stable=True)
    if bool((positions.diff() == 0).any()):
        raise TraceError(f"{step}: the {side} computed a token twice")
    return positions, torch.cat([record.values for record in records])[order]


def _bits(values: torch.Tensor) -> torch.Tensor:
    if values.dtype not in _BITS:
        raise TraceError(f"cannot compare {values.dtype} as bits")
    return values.contiguous().view(_BITS[values.dtype])


def _value(value: torch.Tensor, records: Sequence[Record], token: int) -> Value:
    record = next(record for record in records if token in record.positions.tolist())
    width = 8 * value.dtype.itemsize
    bits = int(_bits(value.reshape(1))[0]) & ((1 << width) - 1)
    return Value(value.item(), f"0x{bits:0{width // 4}x}", record.ran, record.module)
