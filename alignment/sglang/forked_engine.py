"""SGLang's engine for a machine without a GPU: its ranks and its detokenizer are forked from the process that owns it.

A spawned process imports torch and SGLang once more: eight seconds of a core and 600 MB each. SGLang spawns because a
process that has used CUDA cannot be forked. Without CUDA it can, as long as it has computed nothing: OpenMP's pool of
threads would be missing in the children, and they would wait for it forever.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from sglang.srt.entrypoints import engine


class ForkedEngine(engine.Engine):
    """Overrides the step that SGLang names as the place for other ways of starting its ranks."""

    @classmethod
    def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
        multiprocessing.set_start_method("fork", force=True)  # SGLang has just chosen spawn; the detokenizer comes next
        return super()._launch_scheduler_processes(*args, **kwargs)
