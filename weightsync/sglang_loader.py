"""The functions SGLang's scheduler calls by name on its live model: ``digest``, ``flip_bit``, ``trace``.

SGLang calls a custom weight loader with the model and the tensors it was sent, drops its result, and dies with it if it
raises. So a request is one uint8 tensor of JSON that names an ``answer`` file; the answer, ``{"result": …}`` or
``{"error": text}``, is written there and nothing is raised. No weights pass through SGLang's own endpoints.

Parameters are addressed by their Hugging Face names, as views into the engine's fused ones: what is digested or flipped
is the memory the next forward pass reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from zerokl.weightsync.digest import tensor_digest
from zerokl.weightsync.errors import WeightSyncError


def digest(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Answer the digest of every live parameter."""
    _answer(named_tensors, lambda _: _digests(live_parameters(model)))


def flip_bit(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Flip ``bit`` of ``element`` (flat index) of the parameter ``name``, in place."""

    def action(request: dict[str, Any]) -> None:
        name, element, bit = request["name"], request["element"], request["bit"]
        _make_writable(model, name)
        target = live_parameters(model).get(name)
        if target is None:
            raise WeightSyncError(f"the model has no parameter {name!r}")
        bits = 8 * target.dtype.itemsize
        if not 0 <= element < target.numel() or not 0 <= bit < bits:
            raise WeightSyncError(f"{name!r} has {target.numel()} elements of {bits} bits: no bit {bit} of {element}")
        octet = target.view(-1).view(torch.uint8)[element * target.dtype.itemsize + bit // 8]
        with torch.no_grad():
            octet.bitwise_xor_(1 << bit % 8)

    _answer(named_tensors, action)


def trace(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Let the model's tracer record into ``folder`` from now on, with the fault ``plant`` unless it is None."""

    def action(request: dict[str, Any]) -> None:
        tracer: Any = model.zerokl_tracer
        tracer.start(request["folder"], request["plant"])

    _answer(named_tensors, action)


def live_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Hugging Face name -> view of the live parameter, contiguous. A tied head is the embedding, listed once."""
    whole = model.named_parameters()  # lists a shared parameter once
    return {name: view for full, parameter in whole for name, view in live_parts(model, full, parameter)}


def _make_writable(model: torch.nn.Module, name: str) -> None:
    """Give the parameter that holds ``name`` memory of its own: a transfer may have left it in memory nobody can
    write."""
    for full, parameter in model.named_parameters():
        if name in dict(live_parts(model, full, parameter)):
            parameter.data = parameter.data.clone()


def live_parts(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors a parameter of SGLang holds: parts of a fused one, real rows of a padded one."""
    path, _, leaf = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    module = model.get_submodule(path)
    data = parameter.data
    if last == "qkv_proj":
        owner = model.get_submodule(parent)
        sizes = [int(owner.q_size), int(owner.kv_size), int(owner.kv_size)]  # type: ignore[arg-type]
        names = ["q_proj", "k_proj", "v_proj"]
    elif last == "gate_up_proj":
        sizes, names = [data.shape[0] // 2] * 2, ["gate_proj", "up_proj"]
    elif leaf in ("w13_weight", "w2_weight") and last == "experts":
        yield from _experts(path, leaf, data)
        return
    elif last in ("embed_tokens", "lm_head"):
        rows = int(module.org_vocab_size)  # type: ignore[arg-type]
        yield name, data[:rows]
        return
    else:
        yield name, data
        return
    if sum(sizes) != data.shape[0]:
        raise WeightSyncError(f"parameter {name!r} has {data.shape[0]} rows, its parts {names} have {sizes}")
    for part, view in zip(names, data.split(sizes), strict=True):
        yield f"{parent}.{part}.{leaf}", view


def _experts(path: str, leaf: str, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Every expert's own matrices: w13_weight [E, 2 F, H] holds its gate rows and then its up rows."""
    parts = ["gate_proj", "up_proj"] if leaf == "w13_weight" else ["down_proj"]
    for expert, stacked in enumerate(data):
        for part, view in zip(parts, stacked.chunk(len(parts)), strict=True):
            yield f"{path}.{expert}.{part}.weight", view


def _digests(targets: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: tensor_digest(view) for name, view in targets.items()}


def _answer(named_tensors: list[tuple[str, torch.Tensor]], action: Callable[[dict[str, Any]], Any]) -> None:
    """Run ``action`` on the decoded request and write its result, or its error, to the request's answer file."""
    ((_, payload),) = named_tensors
    request = json.loads(payload.numpy().tobytes())
    try:
        answer = {"result": action(request)}
    except Exception as error:  # noqa: BLE001  (the owner raises it; raised here it would kill the scheduler)
        text = str(error) if isinstance(error, WeightSyncError) else f"{type(error).__name__}: {error}"
        answer = {"error": text}
    descriptor = os.open(request["answer"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(answer, file)
