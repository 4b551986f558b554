"""SGLang on zerokl's kernels: a rollout engine in its own process, and the plugin that binds SGLang to the kernels."""

from zerokl.alignment.sglang.config import EngineConfig
from zerokl.alignment.sglang.engine import RolloutEngine

__all__ = ["EngineConfig", "RolloutEngine"]
