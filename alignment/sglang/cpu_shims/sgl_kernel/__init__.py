"""Import-only stand-in for `sgl_kernel` on CPU.

SGLang imports functions named ``…_cpu`` from here and calls them in features zerokl engines do not use (speculative
decoding, KV offload). No ``torch.ops.sgl_kernel`` operator is defined: SGLang takes their absence as "no AMX" and stays
on the paths that zerokl binds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.0.0+zerokl.cpu"


def __getattr__(name: str) -> Callable[..., Any]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"the CPU stand-in for sgl_kernel has no {name!r}")

    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build; switch off the SGLang feature that calls it")

    return missing
