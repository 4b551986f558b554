"""The rollout actor: owns a `RolloutEngine`, whose SGLang runs in a child process of this actor's process."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerokl.orchestrate import hosts
from zerokl.orchestrate.errors import EngineLost
from zerokl.orchestrate.hosts import Host
from zerokl.orchestrate.logs import redirect_output

if TYPE_CHECKING:
    from zerokl.alignment.sglang.config import EngineConfig
    from zerokl.alignment.sglang.engine import RolloutEngine
    from zerokl.alignment.types import Generation, Request

_DIGEST_TIMEOUT_S = 60.0
_PING_S = 15.0


class Rollout:
    """Plain Python, so that it can be tested without Ray; the driver wraps it as an actor."""

    engine: RolloutEngine
    start_timeout_s: float
    _own: tempfile.TemporaryDirectory[str] | None = None

    def host(self, needed: Sequence[Path]) -> Host:
        """Where this actor is; see `hosts.here`."""
        return hosts.here(needed)

    def start(
        self, config: EngineConfig, log: Path, scratch: Path | None, start_timeout_s: float
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Start the engine; returns (manifest, weights digest). Not the constructor: there, errors lose their type.

        The engine's temporary files go below `scratch`, which outlives this process if it is killed; None: below a
        folder of this host, as the path has to be short.
        """
        redirect_output(log)
        if scratch is None:
            self._own = tempfile.TemporaryDirectory(prefix="zerokl-")
        tempfile.tempdir = self._own.name if self._own else str(scratch)
        from zerokl.alignment.sglang.engine import RolloutEngine

        self.start_timeout_s = start_timeout_s
        self.engine = RolloutEngine(config, start_timeout_s=start_timeout_s)
        return self.engine.manifest(), self.engine.weights_digest(timeout_s=_DIGEST_TIMEOUT_S)

    def generate(self, requests: Sequence[Request], timeout_s: float) -> list[Generation]:
        """One generation per request, in order. Raises EngineLost if the engine died; `revive` starts another."""
        from zerokl.alignment.sglang.errors import EngineDied

        try:
            return self.engine.generate(requests, timeout_s=timeout_s)
        except EngineDied as error:
            raise EngineLost(str(error)) from error

    def revive(self) -> bool:
        """Start a new engine if this one no longer answers; returns whether that was so. It has no weights yet."""
        from zerokl.alignment.sglang.engine import RolloutEngine
        from zerokl.alignment.sglang.errors import EngineError

        try:
            self.engine.serving(timeout_s=_PING_S)
        except (EngineError, TimeoutError) as error:
            if self.engine.alive:  # it refused, which another one would do too
                raise
            print(f"starting another engine: {error}", flush=True)
            self.engine = RolloutEngine(self.engine.config, start_timeout_s=self.start_timeout_s)
            return True
        return False

    def close(self) -> None:
        """Stop the engine's process and wait for it."""
        self.engine.close()
        if self._own:
            self._own.cleanup()
