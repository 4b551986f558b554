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
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import parties
import torch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.protocol import Deadlines
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, disk, ipc, rdma

LONG = Deadlines(plan=90, prepare=90, transfer=90, verify=90, commit=90, resume=90, abort=30)
"""Never passed, however busy the machine is."""
SHORT_S = 0.5
"""Always passed: somebody is stopped, or without a network, for longer."""


def waited_out(step: str) -> Deadlines:
    """Short where waiting is the point: in one phase, and for the confirmation of those that will not come."""
    return dataclasses.replace(LONG, **{step: SHORT_S, "abort": SHORT_S})


PATIENCE_S = 100.0
USED = ("channel", "members", "quantised", "transports.collective", "transports.disk", "transports.rdma")
NIXL = [f"{package}.{module}" for package in rdma.PACKAGES for module in ("_api", "_bindings")]
TRAINER, ENGINES = MegatronSizes(tp=2, vocabulary_multiple=4), SglangSizes(engines=2)
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def context():
    """The fork server, started once, with all loaded that takes long; what is not installed is left out."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(["torch", *(f"zerokl.weightsync.{name}" for name in USED), *NIXL])
    return ctx


def source_end(transport: str, folder: Path):
    match transport:
        case "ipc":
            return ipc.IpcSource(folder)
        case "rdma":
            return rdma.RdmaSource()
        case "collective":
            return collective.CollectiveSource(folder, ranks=(2, 2))
    return disk.DiskSource(folder / "disk", delta_below=2)


def target_end(transport: str, folder: Path):
    match transport:
        case "ipc":
            return ipc.IpcTarget()
        case "rdma":
            return rdma.RdmaTarget()
        case "collective":
            return collective.CollectiveTarget(folder, ranks=(2, 2))
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


def sender(folder: Path, transport: str, rank: int, pipe) -> None:
    """A sending rank without the coordinator."""
    torch.set_num_threads(1)
    saboteur = Saboteur()
    source = new_source(folder, transport, rank, saboteur)
    for request in requests(pipe):
        match request:
            case "load", seed:
                parties.write(source, parties.trainer_buffers(parties.MODEL, TRAINER, rank, seed))
                pipe.send("loaded")
            case "fault", step, signal_:
                saboteur.step, saboteur.signal = step, signal_
                pipe.send("armed")


def new_source(folder: Path, transport: str, rank: int, observe=lambda _: None) -> WeightSource:
    layout, end = megatron_layout(parties.MODEL, TRAINER), source_end(transport, folder)
    source = WeightSource(folder / "s", parties.TOKEN, layout, rank, end, observe=observe)
    source.start()
    return source


def trainer(folder: Path, transport: str, pipe) -> None:
    """The coordinator, and the first sending rank."""
    torch.set_num_threads(1)
    saboteur = Saboteur()
    coordinator = WeightSender(folder / "s", parties.TOKEN, sources=2, receivers=2, deadlines=LONG, observe=saboteur)
    source = new_source(folder, transport, 0)
    for request in requests(pipe):
        match request:
            case "sync", version, seed, deadlines:
                coordinator.wait(PATIENCE_S)
                parties.write(source, parties.trainer_buffers(parties.MODEL, TRAINER, 0, seed))
                pipe.send(coordinator.sync(version, deadlines=deadlines))
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
                pipe.send(serving(receiver, held, parties.MODEL, rank, seeds))
            case ("patience over",):
                end_patience(receiver)
                pipe.send("over")
            case "fault", step, signal_:
                saboteur.step, saboteur.signal = step, signal_
                pipe.send("armed")


def serving(receiver: WeightReceiver, held: parties.Engine, model, rank: int, seeds: dict[str, int]):
    """(version served or None, whether its weights are that version's, whether the engine runs, state)"""
    version = receiver.serving
    whole = version is None or held.holds(parties.engine_buffers(model, ENGINES, rank, seeds[version]))
    return version, whole, held.running, receiver.machine.state.value


def end_patience(receiver: WeightReceiver) -> None:
    """As if a participant had waited for its next order for as long as it may."""
    receiver._patience = 0.0
    if receiver.job is not None:
        receiver.job.deadline = time.monotonic()
    receiver._inbox.put((None, None))  # nothing: the thread looks at the deadline again


_POLLING = threading.Lock()
"""Starting a process polls all others, too, and of two threads that poll one only one gets to know how it ended."""


class Child:
    """One child process and its pipe."""

    def __init__(self, function, *arguments):
        ours, theirs = context().Pipe()
        self.pipe = ours
        self.process = context().Process(target=function, args=(*arguments, theirs), daemon=True)
        with _POLLING:
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
        with _POLLING:
            code = self.process.exitcode
        if code is not None:
            return "killed" if code == -signal.SIGKILL else f"exit {code}"
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

    def shared_memory(self) -> set[str]:
        """What this process has mapped and others could find: names in /dev/shm, System V's numbers."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        fields = [line.split(maxsplit=5) for line in maps]
        named = {x[5] for x in fields if len(x) > 5 and x[5].startswith("/dev/shm/") and "(deleted)" not in x[5]}
        return named | {x[4] for x in fields if len(x) > 5 and x[5].startswith("/SYSV")}  # their inode

    def weight_files(self) -> set[str]:
        """The memory files with weights that it has open or mapped, by inode."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        found = {line.split()[4] for line in maps if "memfd:zerokl-weights" in line}
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if "memfd:zerokl-weights" in os.readlink(entry):
                    found.add(str(entry.stat().st_ino))
        return found

    def proceed(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self):
        with _POLLING:
            self.process.kill()
            self.process.join()
        self.pipe.close()


class Run:
    """A trainer, another sending rank and two engines with version v1, and then one version after the other; ends all
    of them.

    ``version``: the last one that is known to be committed.
    """

    def __init__(self, folder: Path, transport: str):
        folder.mkdir(mode=0o700)
        self.folder, self.transport = folder, transport
        self.seeds, self.version, self.memory = dict[str, int](), "", set[str]()
        self.trainer, self.senders = Child(trainer, folder, transport), [Child(sender, folder, transport, 1)]
        self.engines = [Child(engine, folder, transport, rank) for rank in range(2)]

    @property
    def children(self) -> list[Child]:
        return [self.trainer, *self.senders, *self.engines]

    def __enter__(self):
        try:
            outcome = self.next_sync()
            assert outcome.committed, outcome
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.end()

    def begin(self, deadlines=LONG) -> str:
        """Have the next version sent; its name. The outcome is the trainer's next answer."""
        seed = max(self.seeds.values(), default=0) + 1
        self.seeds[f"v{seed}"] = seed
        for child in self.senders:
            child.ask("load", seed)
        self.trainer.pipe.send(("sync", f"v{seed}", seed, deadlines))
        return f"v{seed}"

    def next_sync(self, deadlines=LONG):
        """Send the next version."""
        version = self.begin(deadlines)
        outcome = self.trainer.answer(3 * PATIENCE_S)
        self.version = version if outcome.committed else self.version
        return outcome

    def _ask(self, rank):
        version, whole, running, state = self.engines[rank].ask("serving", self.seeds)
        assert whole, f"rollout-{rank} serves {version} with other bytes"
        return version, running, state

    def serves(self, rank) -> str | None:
        """What an engine serves; its weights must be those of that version, byte for byte."""
        return self._ask(rank)[0]

    def served(self) -> list[str | None]:
        """The same of each engine."""
        return [self.serves(rank) for rank in range(len(self.engines))]

    def states(self) -> set[str]:
        """What their participants are in."""
        return {self._ask(rank)[2] for rank in range(len(self.engines))}

    def end_patience(self):
        """Let every engine's participant have waited for the trainer as long as it may."""
        for child in self.engines:
            child.ask("patience over")

    def eventually_served(self, expected: list[str | None]):
        """Wait until the engines serve these versions, and run."""
        self.until(
            lambda: [(version, running) for version, running, _ in map(self._ask, range(len(self.engines)))],
            [(version, version is not None) for version in expected],
        )

    def until(self, look: Callable[[], object], expected: object, timeout_s=PATIENCE_S):
        """Wait until there is nothing else to be seen."""
        end = time.monotonic() + timeout_s
        while (found := look()) != expected:
            assert time.monotonic() < end, f"{found}, expected {expected}"
            time.sleep(0.02)

    def note_memory(self):
        """Keep in mind what could be left of these processes, and that they have no more than they need."""
        for child in self.children:
            self.memory |= child.shared_memory()
            files = child.weight_files()
            limit = 2 * (1 + len(self.senders)) if child in self.engines else 2
            assert len(files) <= limit, f"{len(files)} files of weights in one process; two of each sender take turns"

    def left(self) -> set[str]:
        """What is left of their shared memory now that they have ended."""
        numbers = {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}
        return {name for name in self.memory if name in numbers or (name[0] == "/" and Path(name).exists())}

    def restart_engine(self, rank):
        self.engines[rank].end()
        self.engines[rank] = Child(engine, self.folder, self.transport, rank)

    def restart_sender(self):
        self.senders[0].end()
        self.senders[0] = Child(sender, self.folder, self.transport, 1)

    def restart_trainer(self):
        self.trainer.end()
        self.trainer = Child(trainer, self.folder, self.transport)
