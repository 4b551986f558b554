"""/dev/shm is full while weights are sent: a small one, of the test's own, is filled to its last byte."""

import contextlib
import errno
import os
from multiprocessing import forkserver
from pathlib import Path

import networks
import parties
import processes
import pytest
import test_transports

from zerokl.weightsync.sglang_layout import SglangSizes

SHARED, ROOM = Path("/dev/shm"), 64 << 20


def fill() -> str:
    """Write to /dev/shm until nothing fits; the kernel's word for it."""
    with (SHARED / "filler").open("wb", buffering=0) as file:
        try:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
            os.write(file.fileno(), b"x")
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return "there is room"


def party(pipe) -> None:
    """A trainer and two engines over each transport, in a process with a small /dev/shm."""
    for (name,) in processes.requests(pipe):
        if name == "enter":
            try:
                networks.enter_with_shared_memory(ROOM)
            except OSError as error:
                pipe.send(str(error))
                return
            pipe.send("")
            continue
        folder = SHARED / name  # what `disk` and `collective` write lies in it too
        folder.mkdir(mode=0o700)
        run = parties.Parties(folder, *test_transports.ends(name, folder, 1, 2), rollout=SglangSizes(engines=2))
        try:
            before = run.sync("v1", seed=1).committed
            full = fill()
            outcome = run.sync("v2", seed=2)
            served, whole = run.serving(), run.all_hold(2 if outcome.committed else 1)
            (SHARED / "filler").unlink()
            after = run.sync("v3", seed=3).committed and run.all_hold(3)
        finally:
            run.close()
        pipe.send((before, full, outcome, served, whole, after, run.serving()))


@pytest.fixture(scope="module")
def child():
    processes.context()
    forkserver.ensure_running()
    child = processes.Child(party)
    refused = child.ask("enter")
    if refused:
        pytest.skip(f"this kernel gives users no networks of their own: {refused}")
    yield child
    child.end()


@pytest.mark.parametrize("name", test_transports.NAMES)
def test_full_shared_memory_leaves_one_version(child, name, fault_row):
    before, full, outcome, served, whole, after, last = child.ask(name)
    assert before
    assert full == "ENOSPC"  # the witness
    assert served == ["v2" if outcome.committed else "v1"] * 2
    assert whole
    assert outcome.committed or "space" in outcome.cause or "failed" in outcome.cause
    assert outcome.committed or name != "ipc"  # its memory is in no file system
    assert not outcome.committed or name != "disk"
    assert after
    assert last == ["v3", "v3"]
    fault_row(
        f"{name}: /dev/shm full", "all" if outcome.committed else outcome.failed_in, full, outcome.cause or "committed"
    )
