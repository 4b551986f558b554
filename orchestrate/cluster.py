"""Ray: a private one on the loopback interface, or a running cluster; waiting for actors, never without a deadline."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zerokl.alignment.openmp import PASSIVE
from zerokl.orchestrate.errors import EngineLost, RunError, SyncFailed, UserError

_POLL_S = 0.25
_OBJECT_STORE_BYTES = 128 << 20  # samples and log-probabilities only; weights go through weightsync

Waiting = Callable[[str, float], None]


@contextlib.contextmanager
def cluster(folder: Path, *, cpus: int, address: str = "") -> Iterator[Path]:
    """Ray for the length of the block: a private one, or that at ``address`` ("host:port").

    Yields a scratch folder of this user alone, which goes with it: actors put there what they may not be able to remove
    themselves. With a private Ray its path is short, for sockets; with a running one it lies in `folder`, which all
    hosts have to see.

    `cpus`: what its actors claim together; in a private Ray they take turns, so this may exceed the machine's.

    `folder` (the run's) becomes the directory that Ray puts on its workers' import path in place of the current one:
    a checkout there would expose its folders as top-level modules.

    Raises UserError for a running cluster that does not answer, that has no token, or that is too small.
    """
    if "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        raise RuntimeError("ray was imported before cluster() could turn its token authentication on; import it later")
    # Ray reads its settings from the environment only, and hands them to its own processes
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    with contextlib.ExitStack() as stack:
        if address:
            scratch = Path(tempfile.mkdtemp(prefix="meeting-", dir=folder))
        else:  # socket paths below it must stay under 108 bytes, so not in the run folder
            scratch = Path(tempfile.mkdtemp(prefix="zerokl-ray-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        stack.callback(_leave)
        with contextlib.chdir(folder):
            if address:
                _join(address, cpus)
            else:
                _start(scratch, cpus)
        yield scratch


def _start(scratch: Path, cpus: int) -> None:
    """A private Ray: 127.0.0.1 only, a token of its own, no dashboard."""
    os.environ |= {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",  # the actors are the work itself, no background job
        # despite its name: with it off, Ray keeps 127.0.0.1 as the node's address instead of looking up an outer one,
        # and its servers listen on that address alone
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=0 if not os.environ.get("CUDA_VISIBLE_DEVICES") else None,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        _temp_dir=str(scratch),
    )


def _join(address: str, cpus: int) -> None:
    """A running Ray, whose token the user has (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token)."""
    import ray

    try:
        # a private Ray's workers inherit this process's environment, those of a running one do not
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": PASSIVE})
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"cannot join the Ray cluster at {address}: {str(error).strip().splitlines()[0]}",
            "start the run on one of its hosts, with the cluster's token (RAY_AUTH_MODE=token, ray get-auth-token)",
        ) from error
    there = int(ray.cluster_resources().get("CPU", 0))
    if there < cpus:
        raise UserError(
            f"the run claims {cpus} CPUs, the Ray cluster at {address} has {there}",
            "lower rollout.engines, rollout.threads, train.threads or train.parallel, or add hosts",
        )


def _leave() -> None:
    import ray

    ray.shutdown()


def wait(reference: Any, what: str, *, timeout_s: float, waiting: Waiting, logs: Path) -> Any:
    """The value of a Ray reference. `waiting(what, seconds)` is called while it is not there.

    Raises RunError naming `what` when the deadline passes, the actor dies or the call raises; a UserError, EngineLost
    or SyncFailed raised by the call passes through.
    """
    (value,) = wait_all([reference], what, timeout_s=timeout_s, waiting=waiting, logs=logs)
    return value


def wait_all(
    references: Sequence[Any], what: str, *, timeout_s: float, waiting: Waiting, logs: Path
) -> list[Any]:  # fmt: skip
    """The same for several: all values in order, or the error of the first that fails, whatever the others do."""
    import ray

    values: dict[Any, Any] = {}
    started = time.monotonic()
    while missing := [reference for reference in references if reference not in values]:
        done, _ = ray.wait(missing, timeout=_POLL_S)
        values |= {reference: _value(reference, what, timeout_s, logs) for reference in done}
        elapsed = time.monotonic() - started
        if done:
            continue
        waiting(what, elapsed)
        if elapsed > timeout_s:
            raise RunError(f"waited {timeout_s:g} s for {what}; see {logs}")
    return [values[reference] for reference in references]


def _value(reference: Any, what: str, timeout_s: float, logs: Path) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError | EngineLost | SyncFailed):
            raise cause from None
        raise RunError(f"{what} failed: {type(cause).__name__}: {cause}; see {logs}") from error
    except ray.exceptions.RayActorError as error:
        raise RunError(f"the process died during {what}: {error}; see {logs}") from error
