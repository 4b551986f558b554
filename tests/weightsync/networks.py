"""Network and mount namespaces of one user (user_namespaces(7)), and links between them.

No privilege is needed where the kernel lets users have namespaces. A link is made through netlink (rtnetlink(7),
veth(4)) and switched by ioctl (netdevice(7)).
"""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

VETH = "zerokl0"
NEWNS, NEWUSER, NEWNET = 0x00020000, 0x10000000, 0x40000000
_GET_FLAGS, _SET_FLAGS, _SET_ADDRESS, _SET_MASK = 0x8913, 0x8914, 0x8916, 0x891C
_UP = 1
_NEWLINK, _REQUEST_ACK_CREATE = 16, 0x1 | 0x4 | 0x200 | 0x400
_IFNAME, _LINKINFO, _NETNS_PID, _KIND, _DATA, _PEER = 3, 18, 19, 1, 2, 1


def call(name: str, *arguments: int | bytes) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def enter(kind: int = NEWNET) -> None:
    """Move this process, of one thread, into a user and a network (or mount) namespace of its own. Raises OSError where
    users may not have any."""
    uid, gid = os.getuid(), os.getgid()
    call("unshare", NEWUSER | kind)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def enter_with_shared_memory(nbytes: int) -> None:
    """The same, with a /dev/shm of its own, of so many bytes."""
    enter(NEWNS)
    call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=%d" % nbytes)


def join(pid: int, network_of: int | None) -> None:
    """Move this process into the user namespace of another, and into the network of one, or a new one."""
    _set_namespace(pid, "user")
    if network_of is None:
        call("unshare", NEWNET)
    else:
        _set_namespace(network_of, "net")


def _set_namespace(pid: int, kind: str) -> None:
    opened = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
    try:
        call("setns", opened, 0)
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
