"""`rdma`: NIXL one-sided writes from registered memory into registered memory.

On a machine without a NIC, UCX carries the same calls over shared memory or TCP. A stopped peer or a link that is down
never raises an error here; deadlines and the receivers' acknowledgements catch both. Memory of GPUs is registered as
such; that half has not run yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from zerokl.weightsync.layout import Typed
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.plan import Batch, Copy
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, TransferError

PACKAGES = ("nixl_cu13", "nixl_cu12")
_BACKEND = "UCX"
_POLL_S = 0.0002
_SETTINGS = "TCP_SYN_CNT=2"
"""UCX connects in a call that does not return before TCP gives up, or tries again after the link has come back: as long
again as the link was down, up to two minutes. With two repetitions TCP gives up after seven seconds."""

_Places = frozenset[tuple[int, int]]
"""(address, bytes) of the buffers of one set."""


class Registered(Typed, frozen=True):
    """A receiver's agent, and its buffers: name -> address, bytes."""

    metadata: Annotated[bytes, msgspec.Meta(max_length=1 << 16)]
    buffers: dict[str, tuple[int, int]]
    gpu: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 10)] = -1
    """The device that they are on; -1: the host."""


class _Agent:
    """One NIXL agent and the memory registered with it."""

    def __init__(self, interface: str) -> None:
        package = next((p for p in PACKAGES if importlib.util.find_spec(p)), None)
        if package is None:
            raise TransferError("the rdma transport needs NIXL: pip install nixl-cu12")
        api = importlib.import_module(f"{package}._api")
        # without a thread of its own: both sides poll while they transfer, and an idle engine needs its cores
        settings = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        self.api: Any = api.nixl_agent(secrets.token_hex(16), settings)
        bindings = importlib.import_module(f"{package}._bindings")
        classes = [
            value for name, value in vars(bindings).items() if name.startswith("nixl") and name.endswith("Error")
        ]
        self.errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, *classes)  # they have no common base
        try:
            # nor with its pool of threads ("num_threads"): a write that is given up while they carry it out goes on,
            # on endpoints that are being closed, and has corrupted the process's heap (NIXL 1.5.1)
            # not NIXL's own parameters for devices: "ucx_devices" restricts nothing, "device_list" takes cards only
            only = f",NET_DEVICES={interface}" if interface else ""
            self.api.create_backend(_BACKEND, {"engine_config": _SETTINGS + only})
        except self.errors as error:
            raise TransferError(f"NIXL reaches no network: {type(error).__name__}: {error}") from error
        self._registered: dict[_Places, tuple[Any, list[torch.Tensor]]] = {}

    def register(self, buffers: Buffers) -> None:
        """Register these buffers, and keep at most one other set registered: a receiver's two take turns."""
        gpu, places = gpu_of(buffers), frozenset((buffer.data_ptr(), buffer.numel()) for buffer in buffers.values())
        if places in self._registered:
            return
        if len(self._registered) > 1 or any(_overlap(places, others) for others in self._registered):
            self.forget()  # NIXL finds no registration where one begins inside another
        handle = self.api.register_memory([(*place, max(gpu, 0), "") for place in sorted(places)], _kind(gpu))
        # with the tensors: memory given back while registered could be handed out again, cut differently
        self._registered[places] = handle, list(buffers.values())

    def forget(self) -> None:
        """Take back every registration: nobody can write here with what they were told before."""
        for handle, _ in self._registered.values():
            self.api.deregister_memory(handle)
        self._registered.clear()


class RdmaSource:
    """Writes into the receivers' memory."""

    name = "rdma"

    def __init__(self, *, interface: str = "") -> None:
        """``interface``: the network device that UCX may use; empty: all."""
        self._interface = interface
        self._agent: _Agent | None = _Agent(interface)  # now: loading UCX takes seconds, which no deadline allows for
        self._buffers: Buffers = {}
        self._peers: list[str] = []
        self._handles: list[Any] = []

    def prepare(self, job: Job, buffers: Buffers) -> bytes:  # noqa: ARG002
        agent, self._agent = self._agent, None  # unless it registers: a broken one is of no use to the next attempt
        self._agent = _registered(agent, self._interface, buffers)
        self._buffers = buffers
        return b""

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> int:
        batches: dict[str, list[Batch]] = {}
        for batch in job.sent():
            batches.setdefault(name_of(source=False, rank=batch.target), []).append(batch)
        running = {name: self._start(job, name, parse(endpoints.get(name, b"")), b) for name, b in batches.items()}
        while running:
            job.check("writes to " + ", ".join(sorted(running)))
            running = {name: handle for name, handle in running.items() if not self._written(name, handle)}
            time.sleep(_POLL_S)
        return sum(batch.nbytes for batch in job.sent())

    def finish(self) -> None:
        if self._agent is None:
            return
        try:
            for handle in self._handles:
                self._agent.api.release_xfer_handle(handle)
            for peer in self._peers:
                self._agent.api.remove_remote_agent(peer)
        except self._agent.errors:  # a write to a lost peer cannot be ended one by one: the next attempt starts afresh
            self._agent = None
        self._handles, self._peers, self._buffers = [], [], {}

    def _written(self, name: str, handle: Any) -> bool:
        """Whether a write is complete. Raises TransferError if it failed."""
        assert self._agent is not None
        try:
            state = self._agent.api.check_xfer_state(handle)
        except self._agent.errors as error:
            raise TransferError(f"the write to {name} failed: {type(error).__name__}") from error
        if state == "ERR":
            raise TransferError(f"the write to {name} failed")
        return state == "DONE"

    def _start(self, job: Job, name: str, target: Registered, batches: list[Batch]) -> Any:
        copies = [copy for batch in batches for copy in batch.copies]
        sources = {key: (buffer.data_ptr(), buffer.numel()) for key, buffer in self._buffers.items()}
        gpu = gpu_of(self._buffers)
        here = runs([(sources[c.source_buffer], c.source_offset, c.source_pitch, c) for c in copies], gpu)
        missing = sorted({c.target_buffer for c in copies} - target.buffers.keys())
        if missing:
            raise TransferError(f"{name} registered no buffer {missing[0]!r}")
        places = [(target.buffers[c.target_buffer], c.target_offset, c.target_pitch, c) for c in copies]
        there = runs(places, target.gpu)
        assert self._agent is not None
        api = self._agent.api
        try:
            peer = api.add_remote_agent(target.metadata)
            self._peers.append(peer)
            descriptors = [api.get_xfer_descs(here, _kind(gpu)), api.get_xfer_descs(there, _kind(target.gpu))]
            handle = api.initialize_xfer("WRITE", *descriptors, peer, _notice(job.attempt, job.rank))
            self._handles.append(handle)
            api.transfer(handle)
        except self._agent.errors as error:
            raise TransferError(f"cannot write to {name}: {type(error).__name__}: {error}") from error
        return handle


class RdmaTarget:
    """Registers its memory and waits for every sender's notice."""

    name = "rdma"

    def __init__(self, *, interface: str = "", device: torch.device | None = None) -> None:
        """``interface``: the network device that UCX may use; empty: all. ``device``: a GPU for the shadow buffers."""
        self._interface, self._device = interface, device
        self._agent: _Agent | None = _Agent(interface)  # now: loading UCX takes seconds, which no deadline allows for
        self._given = self._room = Room({})
        self._buffers: dict[str, torch.Tensor] = {}

    def prepare(self, job: Job, room: Room) -> bytes:  # noqa: ARG002
        self._given, self._room = room, room if self._device is None else room.on(self._device, self._room)
        self._buffers = self._room.all()
        agent, self._agent = self._agent, None
        self._agent = _registered(agent, self._interface, self._buffers)
        places = {name: (buffer.data_ptr(), buffer.numel()) for name, buffer in self._buffers.items()}
        return msgspec.msgpack.encode(Registered(self._agent.api.get_agent_metadata(), places, gpu_of(self._buffers)))

    def transfer(self, job: Job, endpoints: Mapping[str, bytes]) -> Arrived:  # noqa: ARG002  (senders come here)
        assert self._agent is not None
        missing = {_notice(job.attempt, batch.source): batch.source for batch in job.received()}
        while missing:
            names = ", ".join(sorted(name_of(source=True, rank=rank) for rank in missing.values()))
            job.check(f"{names} to write")
            for notices in self._agent.api.get_new_notifs().values():
                for notice in notices:
                    missing.pop(notice, None)
            time.sleep(_POLL_S)
        return Arrived(self._buffers, 0)

    def finish(self) -> None:
        if self._agent is not None and self._given.live is not self._buffers:
            self._agent.forget()  # the attempt failed: a sender that wakes up late must not write here
        self._buffers = {}


def _registered(agent: _Agent | None, interface: str, buffers: Buffers) -> _Agent:
    """The agent with these buffers registered, or a new one: an agent whose network went down registers nothing any
    more. Raises TransferError if the new one registers nothing either."""
    if agent is not None:
        try:
            agent.register(buffers)
            return agent
        except agent.errors:
            del agent  # gives back its sockets and memory; the next one takes tens of milliseconds, UCX being loaded
    fresh = _Agent(interface)
    try:
        fresh.register(buffers)
    except fresh.errors as error:
        raise TransferError(f"NIXL cannot register memory: {type(error).__name__}: {error}") from error
    return fresh


def parse(data: bytes) -> Registered:
    """Decode what a receiver announced. Raises TransferError for anything but that."""
    try:
        found = msgspec.msgpack.decode(data, type=Registered)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not an rdma registration: {error}") from error
    check_places(found.buffers)
    return found


def check_places(buffers: Mapping[str, tuple[int, int]]) -> None:
    """Raise TransferError for an address or a size (buffer -> both) that no memory has."""
    for name, (address, size) in buffers.items():
        if not (0 < address < 1 << 63 and 0 <= size < 1 << 48):
            raise TransferError(f"buffer {name!r} of {size} bytes at {address} cannot be")


def gpu_of(buffers: Buffers) -> int:
    """The number of the GPU that the buffers are on, -1 for the host. Raises TransferError if they are not together."""
    found = {buffer.get_device() for buffer in buffers.values()}  # -1 for the CPU
    if len(found) > 1:
        raise TransferError(f"buffers of one rank lie on several devices: {sorted(found)}")
    return found.pop() if found else -1


def _overlap(some: _Places, others: _Places) -> bool:
    """Whether any place of one set shares a byte with one of the other."""
    spans = sorted((start, start + size) for start, size in some | others)
    disjoint = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    return bool(some & others) or not disjoint


def _kind(gpu: int) -> str:
    """NIXL's name for host or device memory."""
    return "DRAM" if gpu < 0 else "VRAM"


def runs(parts: list[tuple[tuple[int, int], int, int, Copy]], gpu: int = -1) -> np.ndarray:
    """(address, bytes, device) of every row of every copy, int64 [n, 3].

    Raises TransferError outside a buffer.
    """
    for (_, size), offset, pitch, copy in parts:
        if offset + (copy.rows - 1) * pitch + copy.row_bytes > size:
            raise TransferError(f"{copy.tensor!r} does not fit into a buffer of {size} bytes")
    found = np.array([(place[0] + offset, pitch, c.rows, c.row_bytes) for place, offset, pitch, c in parts], np.int64)
    starts, pitches, rows, widths = found.T
    starts, widths = np.repeat(starts, rows) + np.repeat(pitches, rows) * _numbers(rows), np.repeat(widths, rows)
    return np.stack([starts, widths, np.full_like(starts, max(gpu, 0))], axis=1)


def _numbers(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _notice(attempt: bytes, rank: int) -> bytes:
    """What a sender's last write says to its receiver."""
    return attempt + b"%d" % rank


_KNOWN = [msgspec.msgpack.Decoder(kind) for kind in (Registered,)]  # before threads decode them (`messages`)
