"""The trainer's entry point: one coordinator that all participants connect to, and one call per transfer.

with WeightSender(folder / "weights.sock", token, sources=1, receivers=1, ...) as sender:
    sender.source.buffers = ...
    outcome = sender.sync("7", timeout_s=60)
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from zerokl.weightsync import messages as m
from zerokl.weightsync import wire
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Layout
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.protocol import Coordinator, Deadlines, Outcome, Outgoing, Phase
from zerokl.weightsync.topology import AUTO, Choice, choose

_GREETING_S = 5.0


@dataclass
class _Peer:
    connection: wire.Connection
    join: m.Join


class WeightSender:
    """Coordinates ``sources`` sending and ``receivers`` receiving ranks. Use it from one thread."""

    def __init__(
        self, address: Path, token: bytes, *, sources: int, receivers: int, deadlines: Deadlines | None = None,
        transport: str = AUTO, floor_gb_per_s: float = 0.0, host: str = "",
        observe: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Listen at ``address``, in a folder of this user alone; participants prove that they know ``token``.
        ``host``: this machine's IP address, where participants on others are to reach it (`wire.listen`).

        ``transport``: its name, or `topology.AUTO`: then `choice` follows from where the participants are.
        """
        self._wanted = transport
        self.choice: Choice | None = None
        self._names = [name_of(source=True, rank=rank) for rank in range(sources)]
        self._names += [name_of(source=False, rank=rank) for rank in range(receivers)]
        self._sources = sources
        self._token, self._deadlines, self._floor = token, deadlines or Deadlines(), floor_gb_per_s
        self._observe = observe
        self._peers: dict[str, _Peer] = {}
        self._layouts: tuple[Layout, Layout] | None = None
        self._coordinator: Coordinator | None = None
        self._inbox: queue.SimpleQueue[tuple[str, wire.Connection, object]] = queue.SimpleQueue()
        self._address, self._socket = address, wire.listen(address, host)
        threading.Thread(target=self._accept, name="weight-sender", daemon=True).start()

    @property
    def missing(self) -> list[str]:
        """Participants that are not connected."""
        return [name for name in self._names if name not in self._peers]

    def wait(self, timeout_s: float) -> None:
        """Wait until every participant is connected. Raises TimeoutError naming those that are not."""
        deadline = time.monotonic() + timeout_s
        while self.missing or not self._inbox.empty():
            try:
                self._note(*self._inbox.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                raise TimeoutError(f"waited {timeout_s:g} s for {', '.join(self.missing)} to connect") from None

    def sync(self, version: str, *, in_flight: m.InFlight = "abort", deadlines: Deadlines | None = None) -> Outcome:
        """Give every receiver this version, or leave every receiver as it is; never anything in between.
        ``in_flight``: what becomes of requests under way; ``deadlines``: others than usual, for this transfer.

        Returns how it ended: look at ``committed`` and ``cause``. Raises WeightSyncError, before anything starts, if a
        participant is not connected, the layouts do not fit together, or a transfer is under way; Unfit, one of these,
        if no transport, or not the wanted one, works between the participants.
        """
        if self._coordinator is not None:
            self._coordinator.check_idle(version)  # before anything is taken from the other transfer's inbox
        while not self._inbox.empty():
            self._note(*self._inbox.get())
        if self.missing:
            raise WeightSyncError(f"{', '.join(self.missing)} not connected: no version is sent to the others alone")
        coordinator = self._plan()
        coordinator.deadlines = deadlines or self._deadlines
        self._send(coordinator, coordinator.begin(secrets.token_bytes(16), version, time.monotonic(), in_flight))
        phase = Phase.IDLE
        while coordinator.phase is not Phase.IDLE:
            if coordinator.phase is not phase:
                phase = coordinator.phase
                self._observe(phase)
            now = time.monotonic()
            try:
                name, connection, item = self._inbox.get(timeout=max(0.0, coordinator.deadline - now))
            except queue.Empty:
                self._send(coordinator, coordinator.tick(time.monotonic()))
                continue
            now = time.monotonic()
            current = self._peers.get(name)
            if isinstance(item, m.Join):
                self._note(name, connection, item)
            elif current is None or current.connection is not connection:
                continue  # said by a connection that is gone
            elif isinstance(item, wire.ConnectionLost):
                self._note(name, connection, item)
                self._send(coordinator, coordinator.lost(name, str(item), now))
            else:
                assert isinstance(item, m.Message)
                self._send(coordinator, coordinator.receive(name, item, now))
            self._send(coordinator, coordinator.tick(time.monotonic()))
        return coordinator.outcome

    def close(self) -> None:
        """Stop listening and end every connection."""
        with contextlib.suppress(OSError):  # not all systems let a listening socket be shut down
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._address.unlink(missing_ok=True)
        for peer in self._peers.values():
            peer.connection.close()

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _plan(self) -> Coordinator:
        """The coordinator for these participants; planned again only when something that they said has changed."""
        joins = [self._peers[name].join for name in self._names]
        places = [join.place for join in joins]
        choice = choose(self._wanted, places[: self._sources], places[self._sources :])
        ranks, tensors = [join.rank for join in joins], joins[0].tensors
        for name, join in zip(self._names, joins, strict=True):
            different = sorted(set(tensors) ^ set(join.tensors), key=lambda tensor: tensor.name)
            if different:  # the order is each side's own
                raise WeightSyncError(f"{name} has another model than {self._names[0]}: {different[:2]}")
        layouts = Layout(tensors, tuple(ranks[: self._sources])), Layout(tensors, tuple(ranks[self._sources :]))
        if self._coordinator is None or (layouts, choice) != (self._layouts, self.choice):
            self._coordinator = Coordinator(
                *layouts, self._deadlines, floor_gb_per_s=self._floor, transport=choice.transport
            )
            self._layouts, self.choice = layouts, choice
        return self._coordinator

    def _send(self, coordinator: Coordinator, outgoing: Outgoing) -> None:
        """Send, and tell the coordinator whom nothing can be sent to."""
        while outgoing:
            (name, message), *outgoing = outgoing
            peer = self._peers.get(name)
            try:
                if peer is None:
                    raise wire.ConnectionLost("not connected")
                peer.connection.send(message)
            except wire.ConnectionLost as error:
                self._peers.pop(name, None)
                more = coordinator.lost(name, str(error), time.monotonic())
                outgoing = more or outgoing

    def _note(self, name: str, connection: wire.Connection, item: object) -> None:
        """Keep track of who is connected."""
        current = self._peers.get(name)
        if isinstance(item, m.Join):
            if name in self._names and current is None:
                self._peers[name] = _Peer(connection, item)
            else:  # unknown, or a second one under the same name
                connection.close()
        elif isinstance(item, wire.ConnectionLost) and current is not None and current.connection is connection:
            del self._peers[name]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(wire.Connection(sock),), daemon=True).start()

    def _welcome(self, connection: wire.Connection) -> None:
        """Authenticate one connection, then pass on what it says."""
        name = ""
        try:
            deadline = time.monotonic() + _GREETING_S
            hello = wire.greet(connection, self._token, deadline)
            name = name_of(source=hello.source, rank=hello.rank)
            self._inbox.put((name, connection, connection.receive(m.Join, deadline=deadline)))
            while True:
                self._inbox.put((name, connection, connection.receive(m.Answer)))
        except wire.ConnectionLost as error:
            connection.close()
            self._inbox.put((name, connection, error))
