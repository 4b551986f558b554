"""Run a command on a Ray cluster of two hosts: two network and mount namespaces on this machine, joined by one link.

python two_hosts.py COMMAND...    exit code and output are the command's; 77: this kernel lets users have no namespaces

The command runs on the first host, which has 3 CPUs as Ray counts them; the second has 1.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "weightsync"))

import networks

REFUSED = 77
HEAD, OTHER, PORT = "10.0.0.1", "10.0.0.2", 6379
RAY = str(Path(sys.executable).parent / "ray")
_SUBREAPER = 36  # prctl(2): orphans become children of this process, so that it can end them
_HOST = networks.NEWNET | networks.NEWNS


def ray(folder: Path, cpus: int, *arguments: str) -> list[str]:
    folder.mkdir()
    return [RAY, "start", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={folder}",
            "--object-store-memory=100000000", *arguments]  # fmt: skip


def second_host(folder: Path, to_parent: int, from_parent: int) -> None:
    """In a child: wait until the link is there, then join the cluster and stay until killed."""
    networks.call("unshare", _HOST)
    os.write(to_parent, b"1")
    os.read(from_parent, 1)
    networks.address(2)
    join = ray(folder / "b", 1, f"--address={HEAD}:{PORT}", f"--node-ip-address={OTHER}")
    os.write(to_parent, b"1" if subprocess.run(join, check=False).returncode == 0 else b"0")
    signal.pause()


def main(command: list[str]) -> int:
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    try:
        networks.enter(_HOST)
    except OSError as error:
        print(error)
        return REFUSED
    folder = Path(tempfile.mkdtemp(prefix="zk-two-"))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    (from_child, to_parent), (from_parent, to_child) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        second_host(folder, to_parent, from_parent)
    try:
        os.read(from_child, 1)
        networks.make_link(child)
        networks.address(1)
        head = ray(
            folder / "a", 3, "--head", "--include-dashboard=false", f"--node-ip-address={HEAD}", f"--port={PORT}"
        )
        subprocess.run(head, check=True)
        os.write(to_child, b"1")
        if os.read(from_child, 1) != b"1":
            raise RuntimeError("the second host did not join")
        return subprocess.run(command, check=False).returncode
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
