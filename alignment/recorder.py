"""Recording the outputs of every zerokl op of a forward pass, row by row in the same form on both sides.

The engines name, shape and order things differently: SGLang sees a prompt in chunks and then one token at a time, adds
residuals inside the norm and keeps queries before keys; Megatron sees the whole sequence, adds residuals itself and
keeps them by key-value head. Every output is brought to one row per token, in the rollout's order of columns, under a
`Step`; `alignment.trace` compares the two sides.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from zerokl.alignment.trace import HEAD, Step, TraceError

_NAMESPACE = "zerokl::"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")
_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class _Rule(NamedTuple):
    """Under which name both sides' op is compared, and by which of its outputs (the last one is the main one)."""

    step: str
    outputs: tuple[str, ...] = ("y",)


_RULES = {
    "embedding": _Rule("embedding"),
    "rms_norm": _Rule("rms_norm", ("sum", "y")),  # the sum it normalises: what the residual stream holds
    "linear": _Rule("linear"),
    "rotary": _Rule("rotary"),
    "attention_paged": _Rule("attention", ("out",)),
    "attention_varlen": _Rule("attention", ("out",)),
    "silu_and_mul": _Rule("silu_and_mul"),
    "router_topk": _Rule("router_topk", ("index", "weight")),
    "moe_gather": _Rule("moe_gather"),
    "grouped_linear": _Rule("grouped_linear"),
    "moe_combine": _Rule("moe_combine", ("out",)),
    "sample": _Rule("logprob", ("logprob",)),
    "selected_logprob": _Rule("logprob", ("logprob",)),
}
EXPERT_SILU = "expert_silu_and_mul"
OPS = tuple(dict.fromkeys([rule.step for rule in _RULES.values()] + [EXPERT_SILU]))
"""The names of all steps. `moe_order` has none: its rows depend on the batch, and `moe_gather` shows where they go."""


@dataclass(frozen=True)
class Plant:
    """A fault: one element of one op's main output, for one token (absolute position), off by one unit in the last
    place. ``layer`` None: outside the layers; ``call``: which call of the op in the layer, from 0; ``element``: of the
    token's row as it is compared."""

    op: str
    layer: int | None
    token: int
    call: int = 0
    element: int = 0


class Modules:
    """Which module of a model runs, kept by forward hooks while the block lasts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Modules:
        for name, module in self._model.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._pusher(name)))
                self._handles.append(module.register_forward_hook(self._pop, always_call=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def layer(self) -> int | None:
        """The decoder layer that runs, from 0; None outside of them."""
        found = (match for match in map(_LAYER.search, self._running) if match)
        return next((int(match[1]) for match in found), None)

    @property
    def path(self) -> str:
        return self._running[-1] if self._running else ""

    def _pusher(self, name: str) -> Any:
        def push(*_: Any) -> None:
            parent = self.path
            # a module that layers share, such as SGLang's rotary embedding, is listed under the first of them
            self._running.append(name if name.startswith(parent) else f"{parent}.{name.rpartition('.')[2]}")

        return push

    def _pop(self, *_: Any) -> None:
        self._running.pop()


class Recorder(TorchDispatchMode):
    """Writes one safetensors file per forward pass into ``folder``; active inside ``with recorder:``.

    ``columns``: for modules whose name ends so, the order in which their output columns are compared.
    Raises TraceError for an op it has no rule for, or rows that are not those of the forward's tokens.
    """

    def __init__(
        self,
        folder: str | Path,
        modules: Modules,
        *,
        columns: Mapping[str, torch.Tensor] | None = None,
        plant: Plant | None = None,
    ) -> None:
        super().__init__()
        self._folder, self._modules, self._columns, self._plant = Path(folder), modules, columns or {}, plant
        self._forwards = 0
        self._reset()

    def begin(self, positions: torch.Tensor, scored: torch.Tensor) -> None:
        """A forward pass over one sequence's tokens at ``positions`` int64 [T]; its head sees those at ``scored``."""
        self.finish()
        self._positions, self._scored = positions.detach().clone(), scored.detach().clone()

    def finish(self) -> None:
        """Write what was recorded since `begin`, if anything was."""
        if self._steps:
            tensors = self._tensors | {"positions": self._positions, "scored": self._scored}
            path = self._folder / f"{self._forwards:06d}.safetensors"
            save_file(tensors, path, metadata={"steps": json.dumps(self._steps)})
            self._forwards += 1
        self._reset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith(_NAMESPACE):
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            self._see(name.removeprefix(_NAMESPACE), named | (kwargs or {}))
        return result

    def _reset(self) -> None:
        self._positions = self._scored = torch.empty(0, dtype=torch.int64)
        self._tensors: dict[str, torch.Tensor] = {}
        self._steps: list[dict[str, Any]] = []
        self._calls: Counter[tuple[int | None, str]] = Counter()
        self._order: torch.Tensor | None = None  # int64 [T k]: the row of every token's every slot, in slot order
        self._expert_rows: torch.Tensor | None = None  # the newest output in the experts' order of rows

    def _see(self, op: str, named: dict[str, Any]) -> None:
        if op == "moe_order":
            self._order = named["position"].reshape(-1)
            return
        if op not in _RULES:
            raise TraceError(f"op {op!r} has no rule in a trace; known: {', '.join(_RULES)}")
        if op == "selected_logprob":  # the head is fused into it: its logits are computed apart, by the same rule
            self._see("linear", {"y": _logits(named["hidden"], named["w"])})
        rule = _RULES[op]
        by_expert = op in ("moe_gather", "grouped_linear") or (op == "silu_and_mul" and self._is_expert(named["x"]))
        name = EXPERT_SILU if by_expert and op == "silu_and_mul" else rule.step
        layer = self._modules.layer
        call = self._calls[layer, name]
        self._calls[layer, name] += 1
        rows = self._scored if (layer, name) in HEAD else self._positions
        main = named[rule.outputs[-1]]
        if by_expert:
            self._expert_rows = main
        if self._plant is not None and (layer, name, call) == (self._plant.layer, self._plant.op, self._plant.call):
            self._damage(self._plant, main, rows, by_expert)
        for output in rule.outputs:
            tensor = named["x"] if output == "sum" and named["sum"] is None else named[output]
            self._keep(Step(layer, name, call, output), op, self._canonical(tensor, rows, by_expert))

    def _is_expert(self, x: torch.Tensor) -> bool:
        return self._expert_rows is not None and x.data_ptr() == self._expert_rows.data_ptr()

    def _keep(self, step: Step, op: str, values: torch.Tensor) -> None:
        self._tensors[str(len(self._steps))] = values.detach().clone()
        self._steps.append(step._asdict() | {"ran": op, "module": self._modules.path})

    def _canonical(self, tensor: torch.Tensor, rows: torch.Tensor, by_expert: bool) -> torch.Tensor:
        """[len(rows), width]: each token's values beside each other, expert rows in slot order."""
        tokens = rows.numel()
        if by_expert:
            assert self._order is not None, "moe_gather follows moe_order"
            tensor = tensor.index_select(0, self._order)
        if tokens == 0 or tensor.shape[0] % tokens:
            raise TraceError(f"{self._modules.path}: {tensor.shape[0]} rows are not those of {tokens} tokens")
        tensor = tensor.reshape(tokens, -1)
        for suffix, order in self._columns.items():
            if self._modules.path.endswith(suffix):
                tensor = tensor.index_select(1, order)
        return tensor

    def _damage(self, plant: Plant, main: torch.Tensor, rows: torch.Tensor, by_expert: bool) -> None:
        """Step the bits of the planted element by one, where this pass computes its token."""
        (found,) = torch.nonzero(rows == plant.token, as_tuple=True)
        if found.numel() == 0:
            return
        places = torch.arange(main.numel(), device=main.device).reshape(main.shape)
        row = self._canonical(places, rows, by_expert)[found[0]]
        if plant.element < row.numel():  # else it has no place; raising here would end SGLang's scheduler
            main.view(-1).view(_BITS[main.dtype])[row[plant.element]] += 1


def _logits(hidden: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """fp32 [n, V]: the head's logits, whose log-probabilities `selected_logprob` computes without storing them."""
    y = torch.empty((hidden.shape[0], w.shape[0]), dtype=torch.float32, device=hidden.device)
    torch.ops.zerokl.linear.default(hidden, w, None, 1, y)
    return y
