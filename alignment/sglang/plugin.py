"""The `sglang.srt.plugins` entry point.

SGLang runs `register` in each of its processes, in every engine on the machine. It only makes the name ``zerokl``
known as an attention backend; nothing is patched. An engine started with ``attention_backend="zerokl"`` builds that
backend in its scheduler process once the weights are loaded, and building it binds that one model, its sampler
included, to `zerokl.kernels` (see `hooks`). This server argument is the only switch: it reaches every process of the
engine with SGLang's own configuration.
"""

from __future__ import annotations

from typing import Any

NAME = "zerokl"


def register() -> None:
    """Make the backend known to SGLang. Idempotent."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    if NAME not in ATTENTION_BACKENDS:
        choices.add_attention_backend_choices([NAME])
        register_attention_backend(NAME)(_create)


def _create(runner: Any) -> Any:
    from zerokl.alignment.sglang.attention_backend import create

    return create(runner)
