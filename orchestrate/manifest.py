"""What a verification computed with: contract, profile, and every op with the backend that ran it, as observed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zerokl
from zerokl.kernels import accelerators
from zerokl.kernels.contract import CONTRACT_VERSION, CPU

_NAMESPACE = "zerokl::"
_ISA = {0: "scalar", 1: "avx2", 2: "avx512", 3: "avx512bf16"}  # what the compiled library's `set_isa` answers
_PACKAGES = ("torch", "sglang", "megatron-core", "ray", "transformers", "tokenizers", "numpy", "safetensors")


class Observed(TorchDispatchMode):
    """Counts the zerokl ops that run inside the block: what ran, not what was meant to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(_NAMESPACE):
            self.calls[name.removeprefix(_NAMESPACE)] += 1
        return func(*args, **(kwargs or {}))


def build(engine: dict[str, Any], trainer: dict[str, Any], observed: Observed) -> dict[str, Any]:
    """The manifest of a verification from both engines' own and the ops seen in the trainer's forward.

    With stock kernels `ops` is empty: none of zerokl's ran.
    """
    level = torch.ops.zerokl.set_isa(-1)
    backend = f"cpu-{_ISA.get(level, level)}"
    ops: dict[str, dict[str, Any]] = {}
    for hook in (engine.get("hooks") or {}).get("hooks", []):
        if hook["op"] is None:
            continue
        entry = ops.setdefault(hook["op"], {"backend": backend, "rollout_calls": 0, "trainer_calls": 0})
        entry["rollout_calls"] += hook["calls"]
    for name, calls in sorted(observed.calls.items()):
        entry = ops.setdefault(name, {"backend": backend, "rollout_calls": 0, "trainer_calls": 0})
        entry["trainer_calls"] += calls
    return {
        "contract": CONTRACT_VERSION,
        "profile": CPU.name,
        "machine": platform.machine(),
        "ops": ops,
        "accelerators": accelerators(),
        "engine": engine,
        "trainer": trainer,
    }


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    found = {"zerokl": zerokl.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}
