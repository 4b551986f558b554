"""The rollout actor: owns a `RolloutEngine`, whose SGLang runs in a child process of this actor's process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerokl.orchestrate.logs import redirect_output

if TYPE_CHECKING:
    from zerokl.alignment.sglang.config import EngineConfig
    from zerokl.alignment.sglang.engine import RolloutEngine
    from zerokl.alignment.types import Generation, Request

_DIGEST_TIMEOUT_S = 60.0


class Rollout:
    """Plain Python, so that it can be tested without Ray; the driver wraps it as an actor."""

    engine: RolloutEngine

    def start(
        self, config: EngineConfig, log: Path, scratch: Path, start_timeout_s: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Start the engine; returns (manifest, weights digest). Not the constructor: there, errors lose their type.

        The engine's temporary files go below `scratch`, which outlives this process if it is killed.
        """
        redirect_output(log)
        tempfile.tempdir = str(scratch)
        from zerokl.alignment.sglang.engine import RolloutEngine

        self.engine = RolloutEngine(config, start_timeout_s=start_timeout_s)
        return self.engine.manifest(), self.engine.weights_digest(timeout_s=_DIGEST_TIMEOUT_S)

    def generate(self, requests: Sequence[Request], timeout_s: float) -> list[Generation]:
        """One generation per request, in order."""
        return self.engine.generate(requests, timeout_s=timeout_s)

    def load_weights(self, manifest: str, version: str, timeout_s: float) -> dict[str, str]:
        """Load published weights; returns the digests of the engine's live parameters."""
        return self.engine.load_weights(manifest, version=version, timeout_s=timeout_s)

    def close(self) -> None:
        """Stop the engine's process and wait for it."""
        self.engine.close()
