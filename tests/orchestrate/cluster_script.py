"""Run in a process of its own by test_cluster.py: prints what a private Ray cluster does as JSON."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from zerokl.orchestrate.cluster import cluster, wait
from zerokl.orchestrate.errors import RunError, UserError

# asks the cluster's control service for a key: works with the token, and must not without
ASK = "from ray._raylet import GcsClient; GcsClient(address={address!r}).internal_kv_keys(b'', None, timeout=10)"


class Worker:
    def where(self):
        return os.getcwd(), sys.path, os.nice(0)

    def bad_input(self):
        raise UserError("cause", "remedy")

    def broken(self):
        raise ZeroDivisionError("by zero")

    def sleep(self):
        time.sleep(60)

    def die(self):
        os._exit(3)


def main(folder: Path) -> None:
    waits: list[str] = []

    def outcome(reference, what: str, timeout_s: float = 30) -> str:
        try:
            return str(
                wait(reference, what, timeout_s=timeout_s, waiting=lambda name, _: waits.append(name), logs=folder)
            )
        except (RunError, UserError) as error:
            return f"{type(error).__name__}: {error}"

    with cluster(folder, cpus=2):
        import ray

        worker = ray.remote(num_cpus=1)(Worker).remote()
        cwd, path, nice = ray.get(worker.where.remote(), timeout=60)
        result = {
            "cwd": cwd,
            "path": path,
            "nice": nice,
            "listening": listening(),
            "with_token": ask(ray.get_runtime_context().gcs_address, {}),
            "wrong_token": ask(ray.get_runtime_context().gcs_address, {"RAY_AUTH_TOKEN": "0" * 64}),
            "no_token": ask(ray.get_runtime_context().gcs_address, {"RAY_AUTH_MODE": "disabled"}),
            "bad_input": outcome(worker.bad_input.remote(), "input"),
            "broken": outcome(worker.broken.remote(), "arithmetic"),
            "late": outcome(ray.remote(num_cpus=1)(Worker).remote().sleep.remote(), "sleep", 2),
            "dead": outcome(worker.die.remote(), "death"),
            "waits": sorted(set(waits)),
        }
        family = psutil.Process().children(recursive=True)
    psutil.wait_procs(family, timeout=20)
    result["left"] = [p.name() for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    print(json.dumps(result))


def listening() -> list[str]:
    """Addresses that this process's descendants listen on."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return sorted(found)


def ask(address: str, env: dict[str, str]) -> str:
    """What a process with this environment is told: "" for an answer, else the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK.format(address=address)],
        env=os.environ | env, timeout=90, check=False, capture_output=True, text=True,
    )  # fmt: skip
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
