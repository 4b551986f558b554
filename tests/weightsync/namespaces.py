"""A trainer and two engines as processes in network namespaces of their own; any of them can take the link down.

Over `collective` two namespaces are joined by one link. Over `rdma` there is one namespace, and its loopback device is
the link: UCX looks for devices in /sys, which goes on showing those of the first namespace.

The control connection is a UNIX socket, which does not notice.
"""

from dataclasses import replace
from pathlib import Path

import parties
import processes
import torch
from networks import VETH, address, enter, is_up, join, make_link, switch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.megatron_layout import megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, rdma

ENGINES = SglangSizes(engines=2)
LINKS = {"collective": VETH, "rdma": "lo"}
# more than sockets hold: what a link carries before it goes down is not everything
MODEL = replace(parties.MODEL, vocabulary=16384, hidden=256)


class Cut:
    """Takes the link down when its process reaches a step."""

    def __init__(self, link: str):
        self.link, self.step, self.witness = link, None, None

    def __call__(self, step):
        if step == self.step:
            self.step = None
            switch(self.link, False)
            self.witness = not is_up(self.link)


def _ends(transport: str, folder: Path):
    """(sending end, receiving end), both to be made."""
    if transport == "rdma":
        return lambda: rdma.RdmaSource(interface=LINKS[transport]), lambda: rdma.RdmaTarget(interface=LINKS[transport])
    size = {"ranks": (1, 2), "interface": LINKS[transport]}
    return lambda: collective.CollectiveSource(folder, **size), lambda: collective.CollectiveTarget(folder, **size)


def _network(request, cut: Cut):
    """Obey what is about networks; None for anything else."""
    match request:
        case ("enter",):
            try:
                enter()
            except OSError as error:
                return str(error)
            return ""
        case "join", pid, network_of:
            join(pid, network_of)
        case "link", pid:
            make_link(pid)
        case "address", number:
            address(number)
        case "cut", step:
            cut.step, cut.witness = step, None
        case ("witness",):
            return cut.witness
        case ("up",):
            switch(cut.link, True)
            return is_up(cut.link)
        case _:
            return None
    return "done"


def trainer(folder: Path, transport: str, pipe) -> None:
    torch.set_num_threads(1)
    cut, sender, source = Cut(LINKS[transport]), None, None
    for request in processes.requests(pipe):
        match request:
            case ("start",):
                # its own part is no step of the source's
                observe = lambda phase: cut(phase) if phase in ("verify", "commit") else None  # noqa: E731
                sender = WeightSender(folder / "s", parties.TOKEN, sources=1, receivers=2, observe=observe)
                layout, end = megatron_layout(MODEL, parties.ONE), _ends(transport, folder)[0]()
                source = WeightSource(folder / "s", parties.TOKEN, layout, 0, end, observe=cut)
                source.start()
                pipe.send("started")
            case "sync", version, seed, deadlines:
                sender.wait(processes.PATIENCE_S)
                source.buffers = parties.trainer_buffers(MODEL, parties.ONE, 0, seed)
                pipe.send(sender.sync(version, deadlines=deadlines))
            case _:
                pipe.send(_network(request, cut))


def engine(folder: Path, transport: str, rank: int, pipe) -> None:
    torch.set_num_threads(1)
    cut, held, receiver = Cut(LINKS[transport]), parties.Engine(), None
    for request in processes.requests(pipe):
        match request:
            case ("start",):
                layout, end = sglang_layout(MODEL, ENGINES), _ends(transport, folder)[1]()
                receiver = WeightReceiver(folder / "s", parties.TOKEN, layout, rank, end, held, observe=cut)
                receiver.start()
                pipe.send("started")
            case "serving", seeds:
                pipe.send(processes.serving(receiver, held, MODEL, rank, seeds))
            case _:
                pipe.send(_network(request, cut))


class Run(processes.Run):
    """A trainer and two engines with version v1; ``refused``: why this kernel lets users have no namespaces."""

    def __init__(self, folder: Path, transport: str):
        folder.mkdir(mode=0o700)
        self.transport, self.seeds, self.version = transport, {}, ""
        self.trainer, self.senders = processes.Child(trainer, folder, transport), []
        self.engines = [processes.Child(engine, folder, transport, rank) for rank in range(2)]

    def __enter__(self):
        self.refused = self.trainer.ask("enter")
        if self.refused:
            return self
        here, (first, second) = self.trainer.process.pid, self.engines
        if LINKS[self.transport] == "lo":
            first.ask("join", here, here)
            second.ask("join", here, here)
            self.trainer.ask("up")
        else:
            first.ask("join", here, None)
            second.ask("join", here, first.process.pid)
            self.trainer.ask("link", first.process.pid)
            self.trainer.ask("address", 1)
            first.ask("address", 2)
        for child in (self.trainer, *self.engines):
            child.ask("start")
        return super().__enter__()
