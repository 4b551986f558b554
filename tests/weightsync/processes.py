"""A trainer and engines as real processes that can be killed and stopped at a chosen step of a chosen version.

Children are forked from a server that has torch loaded; each obeys one pipe. `python -m` is not needed: the tests
import this module, and so do the children.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import parties
import torch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.megatron_layout import megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.protocol import Deadlines
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, disk, ipc, rdma

LONG = Deadlines(plan=90, prepare=90, transfer=90, verify=90, commit=90, resume=90, abort=30)
"""Never passed, however busy the machine is."""
SHORT_S = 5


class Impatient(Deadlines):
    """Participants give up on a silent trainer soon, whatever the phases may take."""

    patience = 10.0


def waited_out(step: str, kind: type[Deadlines] = Deadlines) -> Deadlines:
    """Short where waiting is the point: in one phase, and for the confirmation of those that will not come."""
    return kind(**(dataclasses.asdict(LONG) | {step: SHORT_S, "abort": 2}))


PATIENCE_S = 100.0
ENGINES = SglangSizes(engines=2)
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def context():
    """The fork server, started once."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["torch", "zerokl.weightsync.channel", "zerokl.weightsync.members"])
    return ctx


def source_end(transport: str, folder: Path):
    match transport:
        case "ipc":
            return ipc.IpcSource(folder)
        case "rdma":
            return rdma.RdmaSource()
        case "collective":
            return collective.CollectiveSource(folder, ranks=(1, 2))
    return disk.DiskSource(folder / "disk", delta_below=2)


def target_end(transport: str, folder: Path):
    match transport:
        case "ipc":
            return ipc.IpcTarget()
        case "rdma":
            return rdma.RdmaTarget()
        case "collective":
            return collective.CollectiveTarget(folder, ranks=(1, 2))
    return disk.DiskTarget()


def requests(pipe):
    """What the parent asks for, until it is gone."""
    with contextlib.suppress(EOFError):
        while True:
            yield pipe.recv()


class Saboteur:
    """Sends this process a signal when it reaches a step of a version."""

    def __init__(self):
        self.step = self.signal = None

    def __call__(self, step):
        if step == self.step:
            self.step = None
            os.kill(os.getpid(), self.signal)
            time.sleep(0.3)  # the other threads of a process stop a moment later than this one


def trainer(folder: Path, transport: str, pipe) -> None:
    torch.set_num_threads(1)
    saboteur, address = Saboteur(), folder / "s"
    sender = WeightSender(address, parties.TOKEN, sources=1, receivers=2, deadlines=LONG, observe=saboteur)
    source = WeightSource(
        address, parties.TOKEN, megatron_layout(parties.MODEL, parties.ONE), 0, source_end(transport, folder)
    )
    source.start()
    for request in requests(pipe):
        match request:
            case "sync", version, seed, deadlines:
                sender.wait(PATIENCE_S)
                sender._deadlines, sender._coordinator = deadlines, None
                source.buffers = parties.trainer_buffers(parties.MODEL, parties.ONE, 0, seed)
                pipe.send(sender.sync(version))
            case "fault", step, signal_:
                saboteur.step, saboteur.signal = step, signal_
                pipe.send("armed")


def engine(folder: Path, transport: str, rank: int, pipe) -> None:
    torch.set_num_threads(1)
    saboteur, held = Saboteur(), parties.Engine()
    receiver = WeightReceiver(
        folder / "s", parties.TOKEN, sglang_layout(parties.MODEL, ENGINES), rank, target_end(transport, folder), held,
        observe=saboteur,
    )  # fmt: skip
    receiver.start()
    for request in requests(pipe):
        match request:
            case "serving", seeds:
                version = receiver.serving
                whole = version is None or held.holds(
                    parties.engine_buffers(parties.MODEL, ENGINES, rank, seeds[version])
                )
                pipe.send((version, whole, receiver.machine.state.value))
            case "fault", step, signal_:
                saboteur.step, saboteur.signal = step, signal_
                pipe.send("armed")


class Child:
    """One child process and its pipe."""

    def __init__(self, function, *arguments):
        ours, theirs = context().Pipe()
        self.pipe = ours
        self.process = context().Process(target=function, args=(*arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request, timeout_s=PATIENCE_S):
        self.pipe.send(request)
        return self.answer(timeout_s)

    def answer(self, timeout_s=PATIENCE_S):
        assert self.pipe.poll(timeout_s), f"no answer in {timeout_s} s"
        return self.pipe.recv()

    def state(self) -> str:
        """killed, stopped or running, as the kernel says."""
        if not self.process.is_alive():
            return "killed" if self.process.exitcode == -signal.SIGKILL else f"exit {self.process.exitcode}"
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended before the file was opened, or before it was read
            return "ending"
        return "stopped" if text.rpartition(")")[2].split()[0] == "T" else "running"

    def until(self, state: str, timeout_s=PATIENCE_S):
        end = time.monotonic() + timeout_s
        while self.state() != state:
            assert time.monotonic() < end, f"not {state} but {self.state()}"
            time.sleep(0.02)

    def proceed(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Run:
    """One trainer and two engines with version v1; ends all of them."""

    def __init__(self, folder: Path, transport: str):
        folder.mkdir(mode=0o700)
        self.folder, self.transport = folder, transport
        self.seeds = {"v1": 1, "v2": 2, "v3": 3}
        self.trainer = Child(trainer, folder, transport)
        self.engines = [Child(engine, folder, transport, rank) for rank in range(2)]

    def __enter__(self):
        try:
            outcome = self.sync("v1")
            assert outcome.committed, outcome
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for child in [self.trainer, *self.engines]:
            child.end()

    def sync(self, version, deadlines=LONG):
        return self.trainer.ask("sync", version, self.seeds[version], deadlines, timeout_s=3 * PATIENCE_S)

    def serves(self, rank) -> str | None:
        """What an engine serves; its weights must be those of that version, byte for byte."""
        version, whole, _ = self.engines[rank].ask("serving", self.seeds)
        assert whole, f"rollout-{rank} serves {version} with other bytes"
        return version

    def served(self) -> list[str | None]:
        """The same of each engine."""
        return [self.serves(rank) for rank in range(len(self.engines))]

    def eventually_served(self, expected, timeout_s=PATIENCE_S):
        end = time.monotonic() + timeout_s
        while (found := self.served()) != expected:
            assert time.monotonic() < end, f"served {found}, expected {expected}"
            time.sleep(0.05)

    def eventually_in(self, states: set[str], timeout_s=PATIENCE_S):
        """Wait until every engine's participant is in one of these states."""
        end = time.monotonic() + timeout_s
        while not (found := {child.ask("serving", self.seeds)[2] for child in self.engines}) <= states:
            assert time.monotonic() < end, f"in {found}, expected {states}"
            time.sleep(0.05)

    def restart_engine(self, rank):
        self.engines[rank].end()
        self.engines[rank] = Child(engine, self.folder, self.transport, rank)

    def restart_trainer(self):
        self.trainer.end()
        self.trainer = Child(trainer, self.folder, self.transport)
