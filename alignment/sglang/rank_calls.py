"""A function of the weight loader, called on each rank that shares the model, each answering in a file of its own.

SGLang runs a custom weight loader with the same request in all of its ranks. The request is one uint8 tensor of JSON:
``function``, a dotted name; ``request``, what that function takes; ``answers``, rank -> the file it answers in. A rank
without a file has nothing to do.
"""

from __future__ import annotations

import importlib
import json

import torch
from sglang.srt.runtime_context import get_parallel


def call(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Run the request's function on this rank's model."""
    ((name, payload),) = named_tensors
    message = json.loads(payload.numpy().tobytes())
    answer = message["answers"].get(str(get_parallel().tp_rank))
    if answer is None:
        return
    module, _, function = message["function"].rpartition(".")
    own = bytearray(json.dumps(message["request"] | {"answer": answer}).encode())
    getattr(importlib.import_module(module), function)(model, [(name, torch.frombuffer(own, dtype=torch.uint8))])
