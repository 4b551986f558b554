"""The `sglang.srt.plugins` entry point.

SGLang runs `register` in each of its processes, in every engine on the machine. It makes the name ``zerokl`` known as
an attention backend and patches nothing, but for one function that cannot work where CUDA is absent and one that would
pad the model of an engine that asked for zerokl. An engine started
with ``attention_backend="zerokl"`` builds that backend in its scheduler process once the weights are loaded, and
building it binds that one model, its sampler included, to `zerokl.kernels` (see `hooks`). This server argument is the
only switch: it reaches every process of the engine with SGLang's own configuration.
"""

from __future__ import annotations

from typing import Any

from zerokl.alignment.sglang.config import SEGMENTS_KEY

NAME = "zerokl"


def register() -> None:
    """Make the backend known to SGLang. Idempotent."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    _do_not_pin_without_cuda()
    _do_not_pad()
    if NAME not in ATTENTION_BACKENDS:
        choices.add_attention_backend_choices([NAME])
        register_attention_backend(NAME)(_create)


def _do_not_pin_without_cuda() -> None:
    """SGLang pins the buffer of captured experts through CUDA's runtime; plain memory does where there is none."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        target = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"
        HookRegistry.register(target, lambda *_: None, HookType.REPLACE)


def _do_not_pad() -> None:
    """On CPUs SGLang pads MLPs for matrix instructions that zerokl's engines do not use: segments (contract R2) and
    ranks are cut from the width that the model has."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def unpadded(pad: Any, model_config: Any, *args: Any) -> Any:
        return model_config if hasattr(model_config.hf_config, SEGMENTS_KEY) else pad(model_config, *args)

    HookRegistry.register("sglang.srt.configs.update_config.update_intermediate_size", unpadded, HookType.AROUND)


def _create(runner: Any) -> Any:
    from zerokl.alignment.sglang.attention_backend import create

    return create(runner)
