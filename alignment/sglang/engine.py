"""A rollout engine: SGLang in a process of its own, asked over a socket.

    with RolloutEngine(EngineConfig(model_path=...)) as engine:
        generations = engine.generate(requests, timeout_s=60)

Every wait has a deadline. A dead engine raises `EngineError` with the end of its log; after a timeout or a death the
engine is closed and every later call says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from zerokl.alignment import routing_replay
from zerokl.alignment.openmp import PASSIVE
from zerokl.alignment.recorder import Plant
from zerokl.alignment.sglang import errors, protocol
from zerokl.alignment.sglang.config import EngineConfig, check_parallel, check_requests, inspect_model
from zerokl.alignment.sglang.errors import EngineDied, EngineError
from zerokl.alignment.types import Generation, Request

__all__ = ["EngineConfig", "RolloutEngine"]

_LOG_TAIL = 4000
_CLOSE_S = 10.0


class RolloutEngine:
    """Owns one engine process. Calls are served one at a time; use it from one thread or from several."""

    def __init__(self, config: EngineConfig, *, start_timeout_s: float = 180) -> None:
        """Check the model, start the engine and wait until its hooks are proven.

        Raises FileNotFoundError, ValueError or UnsupportedError before anything starts; HookError if a hook did not
        take effect, EngineError if the process died, TimeoutError after ``start_timeout_s``.
        """
        self.config = config
        self._model = inspect_model(config.model_path, config.architecture)
        check_parallel(config, self._model)
        if config.context_length > self._model.max_positions:
            raise ValueError(
                f"context_length {config.context_length} exceeds the model's {self._model.max_positions} positions"
            )
        if config.capture_experts and self._model.router is None:
            raise errors.UnsupportedError(
                f"capture_experts: {self._model.architecture.name} is dense, it routes nothing"
            )
        self._lock = threading.Lock()
        self._closed = ""
        self._folder = Path(tempfile.mkdtemp(prefix="zerokl-engine-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # also for an owner that never closes
        self.log_path = Path(config.log_path) if config.log_path else self._folder / "engine.log"
        ours, theirs = socket.socketpair()
        self._connection: protocol.Connection[protocol.Reply] = protocol.Connection(ours, protocol.Reply)
        self._process = self._spawn(theirs)
        ready = self._ask(protocol.Start(config), protocol.Ready, start_timeout_s, "the engine to start")
        self._manifest = ready.manifest

    def generate(self, requests: Sequence[Request], *, timeout_s: float) -> list[Generation]:
        """Serve all requests concurrently, each from its arrival time on; results in the order of the requests.

        Raises ValueError, naming the request, for one that cannot be served exactly as asked; nothing is sampled then.
        Raises EngineError for an engine with `EngineConfig.transfer` whose weights never came, or came to no good end.
        """
        check_requests(requests, self.config, self._model)
        message = protocol.Generate(tuple(requests))
        reply = self._ask(message, protocol.Generated, timeout_s, f"{len(requests)} generations")
        return [
            self._generation(index, *pair) for index, pair in enumerate(zip(requests, reply.generations, strict=True))
        ]

    def serving(self, *, timeout_s: float = 60) -> str | None:
        """The version of the transferred weights that may be served now; None: none may."""
        return self._served(timeout_s).version

    def state(self, *, timeout_s: float = 60) -> str:
        """The state of the engine's end of weight transfers (`weightsync.participant.State`)."""
        return self._served(timeout_s).state

    def weights_digest(self, *, timeout_s: float = 60) -> dict[str, str]:
        """xxh3_128 of every live parameter, by Hugging Face name; a tied head counts as the embedding only.

        Under tensor parallelism of every rank's part, by `tensor_parallel.rank_name`.
        """
        return self._ask(protocol.WeightsDigest(), protocol.Digests, timeout_s, "the weights' digest").digests

    def flip_weight_bit(self, name: str, element: int, bit: int, *, timeout_s: float = 60) -> None:
        """Flip one bit of one live parameter (Hugging Face name, flat element index): fault injection.

        Under tensor parallelism of the last rank's part.
        """
        message = protocol.FlipWeightBit(name, element, bit)
        self._ask(message, protocol.Done, timeout_s, f"a bit of {name} to flip")

    def trace(self, folder: str | Path, plant: Plant | None = None, *, timeout_s: float = 60) -> None:
        """Record what every op computes from now on into the existing ``folder`` (`alignment.trace.read` reads it).

        Needs `EngineConfig.trace`; generate one request at a time then. ``plant``: a fault, to see it found.
        """
        message = protocol.Trace(str(Path(folder).resolve()), plant)
        self._ask(message, protocol.Done, timeout_s, "a recording to begin")

    def flush_cache(self, *, timeout_s: float = 60) -> None:
        """Drop all cached prefixes."""
        self._ask(protocol.FlushCache(), protocol.Done, timeout_s, "the cache to be flushed")

    def manifest(self) -> dict[str, Any]:
        """What computes the rollout: versions, configuration, and every hook with its op and verified call counts."""
        return self._manifest

    @property
    def alive(self) -> bool:
        """Whether the engine runs: neither closed nor dead."""
        return not self._closed and self._process.poll() is None

    @property
    def process_group(self) -> int:
        """The process group of the engine and every process it started."""
        return self._process.pid

    def close(self) -> None:
        """End the engine and every process it started. Idempotent."""
        with self._lock:
            if not self._closed:
                self._end("the engine was closed", graceful=True)

    def __enter__(self) -> RolloutEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "OMP_NUM_THREADS": str(max(1, self.config.threads // self.config.tensor_parallel)),
            "SGLANG_USE_CPU_ENGINE": "1" if not _has_cuda() else "0",
            # SGLang keeps a few positions to itself; the requests' exact limit is checked here
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            "TMPDIR": str(self._folder),
        }
        if self.config.tensor_parallel > 1:
            env["SGLANG_CPU_OMP_THREADS_BIND"] = _cores_by_rank(self.config.tensor_parallel)
        if not self.config.stock:
            env = PASSIVE | env
        command = [sys.executable, "-P", "-m", "zerokl.alignment.sglang.engine_child", str(theirs.fileno())]
        with theirs, open(self.log_path, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                cwd=self._folder,  # an empty folder: nothing in it can shadow a module
                env=env,
                start_new_session=True,  # one process group to end them all
            )

    def _generation(self, index: int, request: Request, tokens: protocol.Tokens) -> Generation:
        routed, router = None, self._model.router
        if self.config.capture_experts and tokens.output_ids:
            assert router is not None
            fed = len(request.input_ids) + len(tokens.output_ids) - 1
            routed = routing_replay.unpack(tokens.routed_experts or b"", router, fed, f"request {index}")
        return Generation(
            output_ids=tokens.output_ids,
            logprobs=np.frombuffer(tokens.logprobs, dtype="<f4"),
            raw_logprobs=np.frombuffer(tokens.raw_logprobs, dtype="<f4"),
            finish_reason=tokens.finish_reason,
            weight_version=tokens.weight_version,
            cached_tokens=tokens.cached_tokens,
            routed_experts=routed,
            weight_spans=tokens.weight_spans,
        )

    def _served(self, timeout_s: float) -> protocol.Served:
        return self._ask(protocol.Serving(), protocol.Served, timeout_s, "the version it serves")

    def _ask(self, message: protocol.Message, expected: type, timeout_s: float, waiting_for: str) -> Any:
        with self._lock:
            if self._closed:
                raise EngineError(f"cannot wait for {waiting_for}: {self._closed}")
            deadline = time.monotonic() + timeout_s
            try:
                self._connection.send(message, deadline)
                reply = self._connection.receive(deadline)
            except TimeoutError:
                error: Exception = TimeoutError(f"waited {timeout_s:g} s for {waiting_for}; the engine was ended")
                self._end(str(error))
                raise error from None
            except (protocol.ConnectionClosed, msgspec.ValidationError) as cause:
                raise self._died(waiting_for) from cause
            if isinstance(reply, protocol.Failed):
                if isinstance(message, protocol.Start):
                    self._end(f"it did not start: {reply.message}")
                raise _exception(reply)
            if not isinstance(reply, expected):
                self._end(f"it answered {type(reply).__name__} instead of {expected.__name__}")
                raise EngineError(self._closed)
            return reply

    def _died(self, waiting_for: str) -> EngineError:
        with_tail = f"the engine died while waiting for {waiting_for}"
        tail = self._log_tail()
        self._end(with_tail)
        return EngineDied(f"{with_tail} (exit code {self._process.returncode}); the end of its log:\n{tail}")

    def _log_tail(self) -> str:
        return self.log_path.read_bytes()[-_LOG_TAIL:].decode(errors="replace")

    def _end(self, reason: str, *, graceful: bool = False) -> None:
        """Close the connection and kill the process group; ``reason`` answers every later call."""
        self._closed = reason
        if graceful:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # it is killed below in any case
                self._connection.send(protocol.Close(), time.monotonic() + _CLOSE_S)
                self._process.wait(_CLOSE_S)
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_CLOSE_S)
        shutil.rmtree(self._folder, ignore_errors=True)


def _exception(failed: protocol.Failed) -> Exception:
    """The error the engine process met, as the same class where it is one of this package's."""
    kind = {"UnsupportedError": errors.UnsupportedError, "HookError": errors.HookError, "EngineError": EngineError}
    if failed.kind in kind:
        return kind[failed.kind](failed.message)
    return EngineError(f"{failed.kind}: {failed.message}")


def _cores_by_rank(ranks: int) -> str:
    """The cores of each rank in SGLang's form; by default it wants a NUMA node for each."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(",".join(map(str, cores[rank::ranks] or cores)) for rank in range(ranks))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
