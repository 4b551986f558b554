"""A trainer and two engines as processes in network namespaces of their own; any of them can take the link down.

Over `collective` two namespaces are joined by one link. Over `rdma` there is one namespace, and its loopback device is
the link: UCX looks for devices in /sys, which goes on showing those of the first namespace.

Namespaces of this user alone (user_namespaces(7)): no privilege is needed where the kernel lets users have them. The
control connection is a UNIX socket, which does not notice. The link is made through netlink (rtnetlink(7), veth(4)) and
switched by ioctl (netdevice(7)).
"""

import ctypes
import fcntl
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path

import parties
import processes
import torch

from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.megatron_layout import megatron_layout
from zerokl.weightsync.members import WeightReceiver, WeightSource
from zerokl.weightsync.sglang_layout import SglangSizes, sglang_layout
from zerokl.weightsync.transports import collective, rdma

VETH, ENGINES = "zerokl0", SglangSizes(engines=2)
LINKS = {"collective": VETH, "rdma": "lo"}
# more than sockets hold: what a link carries before it goes down is not everything
MODEL = replace(parties.MODEL, vocabulary=16384, hidden=256)
_NEWNS, _NEWUSER, _NEWNET = 0x00020000, 0x10000000, 0x40000000
_GET_FLAGS, _SET_FLAGS, _SET_ADDRESS, _SET_MASK = 0x8913, 0x8914, 0x8916, 0x891C
_UP = 1
_NEWLINK, _REQUEST_ACK_CREATE = 16, 0x1 | 0x4 | 0x200 | 0x400
_IFNAME, _LINKINFO, _NETNS_PID, _KIND, _DATA, _PEER = 3, 18, 19, 1, 2, 1


def _call(name: str, *arguments: int | bytes) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def enter(kind: int = _NEWNET) -> None:
    """Move this process, of one thread, into a user and a network (or mount) namespace of its own. Raises OSError where
    users may not have any."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", _NEWUSER | kind)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def enter_with_shared_memory(nbytes: int) -> None:
    """The same, with a /dev/shm of its own, of so many bytes."""
    enter(_NEWNS)
    _call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=%d" % nbytes)


def join(pid: int, network_of: int | None) -> None:
    """Move this process into the user namespace of another, and into the network of one, or a new one."""
    _set_namespace(pid, "user")
    if network_of is None:
        _call("unshare", _NEWNET)
    else:
        _set_namespace(network_of, "net")


def _set_namespace(pid: int, kind: str) -> None:
    opened = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
    try:
        _call("setns", opened, 0)
    finally:
        os.close(opened)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def make_link(pid: int) -> None:
    """A pair of interfaces of one name, here and in the network of a process."""
    name, header = _attribute(_IFNAME, VETH.encode() + b"\0"), struct.pack("BxHiII", socket.AF_UNSPEC, 0, 0, 0, 0)
    peer = _attribute(_PEER, header + name + _attribute(_NETNS_PID, struct.pack("I", pid)))
    link = header + name + _attribute(_LINKINFO, _attribute(_KIND, b"veth\0") + _attribute(_DATA, peer))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(struct.pack("IHHII", 16 + len(link), _NEWLINK, _REQUEST_ACK_CREATE, 1, 0) + link)
        (error,) = struct.unpack_from("i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, f"no veth link: {os.strerror(-error)}")


def _ioctl(request: int, name: str, argument: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        return fcntl.ioctl(any_socket, request, struct.pack("16s16s8x", name.encode(), argument))


def is_up(name: str) -> bool:
    return bool(struct.unpack_from("H", _ioctl(_GET_FLAGS, name, b""), 16)[0] & _UP)


def switch(name: str, up: bool) -> None:
    (flags,) = struct.unpack_from("H", _ioctl(_GET_FLAGS, name, b""), 16)
    _ioctl(_SET_FLAGS, name, struct.pack("H", flags | _UP if up else flags & ~_UP))


def address(number: int) -> None:
    """Give this end of the link an address, 10.0.0.number of /24, and switch it on."""
    for request, quad in ((_SET_ADDRESS, f"10.0.0.{number}"), (_SET_MASK, "255.255.255.0")):
        _ioctl(request, VETH, struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(quad)))
    switch("lo", True)
    switch(VETH, True)


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
        return lambda: rdma.RdmaSource(devices=LINKS[transport]), lambda: rdma.RdmaTarget(devices=LINKS[transport])
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
