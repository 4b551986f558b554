"""Participants of weight transfers at work: a sending rank and a receiving rank, each in threads of its own process.

    WeightSource    one rank of the trainer
    WeightReceiver  one rank of an engine

Both connect to the coordinator (`channel.WeightSender`), and connect again whenever it comes back.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import xxhash

from zerokl.weightsync import messages as m
from zerokl.weightsync import wire
from zerokl.weightsync.ends import Ends
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Layout, Rank
from zerokl.weightsync.messages import name_of
from zerokl.weightsync.participant import Effect, Participant, State
from zerokl.weightsync.plan import Batch, Plan, make_plan
from zerokl.weightsync.topology import Place
from zerokl.weightsync.transports.base import Arrived, Buffers, Job, Room, Sharing, Source, Target
from zerokl.weightsync.transports.copies import source_digests, target_digests

_GREETING_S = 10.0
_RETRY_S = 0.05
_SETTLE_S = 30.0

Observer = Callable[[str], None]
"""Told the name of each step before it is taken: for logs, progress, and tests that fail at a chosen point."""


class Engine(Protocol):
    """What a receiver does to the engine it feeds. Called from one thread at a time."""

    def pause(self, in_flight: m.InFlight) -> None:
        """Stop answering as soon as the engine can, and before `install` at the latest; ``in_flight``: what becomes of
        requests under way."""
        ...

    def install(self, version: str, buffers: Buffers) -> None:
        """Make these the live weights and drop what was cached under others. The old ones are kept by the caller."""
        ...

    def restore(self, version: str | None, buffers: Buffers) -> None:
        """Undo `install`: the weights from before (none at all before the first version)."""
        ...

    def resume(self, version: str) -> None:
        """Serve again."""
        ...


class _Member:
    """Connection, machine and worker of one participant. Subclasses carry out the effects."""

    def __init__(
        self, address: Path, token: bytes, machine: Participant, *, source: bool, layout: Layout, rank: int,
        place: Place, observe: Observer,
    ) -> None:  # fmt: skip
        self.machine, self.name = machine, name_of(source=source, rank=rank)
        self.last_error = ""
        self._address, self._token, self._observe = address, token, observe
        self._is_source, self._rank, self._held = source, rank, layout.ranks[rank]
        self._join = m.Join(layout.tensors, self._held, place)
        self._planned: tuple[Layout, Layout, Plan] | None = None
        self._inbox: queue.SimpleQueue[tuple[object, object]] = queue.SimpleQueue()
        self._patience = 0.0
        self._in_flight: m.InFlight = "abort"
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._running: Future[m.Message] | None = None
        self._closing = threading.Event()
        self._connection: wire.Connection | None = None
        self.job: Job | None = None
        self._thread = threading.Thread(target=self._run, name=f"{self.name}-control", daemon=True)

    def start(self) -> None:
        """Connect, and serve orders in the background."""
        self._thread.start()

    def close(self) -> None:
        """Leave. An attempt under way fails for everyone."""
        self._closing.set()
        if self._connection is not None:
            self._connection.close()
        self._thread.join()
        self._worker.shutdown()

    def carry_out(self, effect: Effect, order: m.Message) -> m.Message:
        """Perform an effect; returns the answer. Runs in the worker thread; raises what went wrong."""
        raise NotImplementedError

    def undo(self) -> None:
        """Go back to the version before the attempt. Runs when the worker is idle."""
        raise NotImplementedError

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._connection = wire.connect(self._address, _RETRY_S)
                if self._closing.is_set():  # `close` has seen only the connection before
                    self._connection.close()
                deadline = time.monotonic() + _GREETING_S
                who = {"source": self._is_source, "rank": self._rank}
                wire.introduce(self._connection, self._token, **who, deadline=deadline)  # type: ignore[arg-type]
                self._connection.send(self._join)
            except wire.ConnectionLost as error:
                self.last_error = str(error)
                self._closing.wait(0.05)
                continue
            self._serve(self._connection)

    def _serve(self, connection: wire.Connection) -> None:
        """Take orders until the connection ends, then leave the attempt it was in."""
        threading.Thread(target=_read, args=(connection, self._inbox), daemon=True).start()
        while True:
            patience = self.job.deadline - time.monotonic() if self.job and self.machine.waiting else None
            try:
                origin, item = self._inbox.get(timeout=None if patience is None else max(0.0, patience))
            except queue.Empty:
                self.last_error = f"waited for the coordinator in state {self.machine.state}"
                self._roll_back()
                continue
            if isinstance(item, Future):
                if item is self._running:
                    self._running = None
                    self._finished(connection, item)
            elif origin is not connection:
                continue  # said by a connection that is gone
            elif isinstance(item, wire.ConnectionLost):
                self.last_error = str(item)
                self._coordinator_gone()
                return
            else:
                assert isinstance(item, m.Message)
                self._take(connection, item)

    def _take(self, connection: wire.Connection, order: m.Message) -> None:
        attempt: bytes = getattr(order, "attempt", b"")
        if isinstance(order, m.Abort):
            effect = self.machine.receive(order)
            if effect is Effect.ROLL_BACK:
                self.last_error = order.cause
                self._roll_back()
            _reply(connection, m.Aborted(attempt, self.machine.state is not State.IDLE))
            return
        if isinstance(order, m.Plan) and self.machine.resuming and self._running is not None:
            resumed, self._running = self._running, None  # late: the coordinator has not waited, and goes on
            self._finished(connection, resumed)
        effect = Effect.REFUSE if self._running else self.machine.receive(order)
        if effect is Effect.REFUSE:
            _reply(connection, m.Failed(attempt, m.shortened(self.machine.refusal(order))))
            return
        if isinstance(order, m.Plan):
            self.job = Job(attempt, order.version, Plan((), ""), self._rank, self.machine.version)
            self._patience, self._in_flight = order.patience_s, order.in_flight
        assert self.job is not None
        self.job.deadline = time.monotonic() + self._patience
        future = self._worker.submit(self._observed, effect, order)
        self._running = future
        future.add_done_callback(lambda done: self._inbox.put((None, done)))

    def _observed(self, effect: Effect, order: m.Message) -> m.Message:
        self._observe(effect)
        return self.carry_out(effect, order)

    def _finished(self, connection: wire.Connection, future: Future[m.Message]) -> None:
        """The worker is done with an effect, or will be soon: wait for it, and answer."""
        job = self.job
        assert job is not None
        error = future.exception()
        if error is None:
            self.machine.done()
            job.deadline = time.monotonic() + self._patience
            _reply(connection, future.result())
            return
        self.last_error = f"{type(error).__name__}: {error}"
        cause = str(error) if isinstance(error, WeightSyncError) else self.last_error
        _reply(connection, m.Failed(job.attempt, m.shortened(cause)))  # before others fail for what is undone here
        self._roll_back()

    def _coordinator_gone(self) -> None:
        if self.machine.resuming and self._running is not None and self._running.exception() is None:  # waits
            self._running = None
            self.machine.done()
        elif self.machine.state is State.COMMITTED:  # the others may serve either version by now
            self._stop_worker()
            self.machine.quarantine()
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        self._stop_worker()
        try:
            self.undo()
        except Exception as error:  # noqa: BLE001  (whatever it was: the engine holds nothing that could be trusted)
            self.last_error = f"{type(error).__name__}: {error}"
            self.machine.quarantine()

    def _stop_worker(self) -> None:
        if self._running is not None and self.job is not None:
            self.job.cancelled.set()
            self._running.exception()  # waits; the error is that of the cancellation
            self._running = None

    def _make_plan(self, order: m.Plan) -> m.Planned:
        """Compute the plan (kept from the last time if nothing changed) and check that it speaks of this rank."""
        mine = order.sender if self._is_source else order.receiver
        if len(mine.ranks) <= self._rank or mine.ranks[self._rank] != self._held:
            raise WeightSyncError(f"the plan has another layout for {self.name} than it has itself")
        if self._planned is None or self._planned[:2] != (order.sender, order.receiver):
            self._planned = order.sender, order.receiver, make_plan(order.sender, order.receiver)
        assert self.job is not None
        self.job.plan = self._planned[2]
        return m.Planned(order.attempt, self.job.plan.digest)


class WeightSource(_Member):
    """One sending rank. ``transport``: its only end, or the ends to have when the coordinator has chosen. ``buffers``
    is read during a transfer: set it before, and leave its bytes alone meanwhile."""

    def __init__(
        self, address: Path, token: bytes, layout: Layout, rank: int, transport: Source | Ends[Source], *,
        observe: Observer = lambda _: None,
    ) -> None:  # fmt: skip
        machine = Participant(source=True)
        self._ends = transport if isinstance(transport, Ends) else Ends.only(transport)
        super().__init__(
            address, token, machine, source=True, layout=layout, rank=rank, place=self._ends.place, observe=observe
        )
        self.buffers: Buffers = {}
        self._sent = self._committed = False

    @property
    def _transport(self) -> Source:
        return self._ends.current

    def renew(self, timeout_s: float = _SETTLE_S) -> Buffers | None:
        """Other memory for `buffers`, to write the next version into, where receivers can read it without a copy; None
        where the transport has none: then they stay. What it holds first is undefined.

        What was sent may be written no more. Raises TransferError if there is no memory, WeightSyncError if a transfer
        that failed has not ended here ``timeout_s`` later."""
        deadline = time.monotonic() + timeout_s
        while self.job is not None and self.machine.state is not State.IDLE and not self.machine.resuming:
            if time.monotonic() > deadline:
                raise WeightSyncError(f"waited {timeout_s:g} s for {self.name} to end sending {self.job.version!r}")
            time.sleep(_RETRY_S)
        end = self._ends.current if self._sent else None
        found = end.next_buffers(committed=self._committed) if isinstance(end, Sharing) else None
        self.buffers = self.buffers if found is None else found
        return found

    def carry_out(self, effect: Effect, order: m.Message) -> m.Message:
        job = self.job
        assert job is not None
        match order:
            case m.Plan():
                self._ends.use(order.transport)
                return self._make_plan(order)
            case m.Prepare(attempt):
                _check_sizes(self.buffers, self._held)
                self._sent, self._committed = True, False
                return m.Prepared(attempt, self._transport.prepare(job, self.buffers))
            case m.Transfer(attempt, endpoints):
                start = time.monotonic()
                copied = self._transport.transfer(job, endpoints)
                seconds = time.monotonic() - start
                return m.Transferred(attempt, source_digests(self.buffers, job.sent(), job.digests), copied, seconds)
            case m.Resume(attempt):
                self._committed = True
                self._ends.finish()
                return m.Resumed(attempt)
        raise WeightSyncError(f"a source does not {effect}")

    def undo(self) -> None:
        self._ends.finish()
        self.machine.rolled_back()


class WeightReceiver(_Member):
    """One receiving rank and the engine it feeds. ``transport``: as for a source. ``in_place``: the engine's own
    buffers, where there is no memory for a second version."""

    def __init__(
        self, address: Path, token: bytes, layout: Layout, rank: int, transport: Target | Ends[Target], engine: Engine,
        *, in_place: Buffers | None = None, observe: Observer = lambda _: None,
    ) -> None:  # fmt: skip
        machine = Participant(source=False, in_place=in_place is not None)
        self._ends = transport if isinstance(transport, Ends) else Ends.only(transport)
        super().__init__(
            address, token, machine, source=False, layout=layout, rank=rank, place=self._ends.place, observe=observe
        )
        self._engine = engine
        self._room = Room(self._held.buffers, in_place)
        self._arrived = Arrived({}, 0)
        self._paused = self._installed = False
        self._paused_at = 0.0

    @property
    def _transport(self) -> Target:
        return self._ends.current

    @property
    def serving(self) -> str | None:
        """The version that may be served now; None if none may."""
        return self.machine.version if self.machine.serving else None

    def carry_out(self, effect: Effect, order: m.Message) -> m.Message:
        job = self.job
        assert job is not None
        match order:
            case m.Plan():
                self._ends.use(order.transport)
                return self._make_plan(order)
            case m.Prepare(attempt):
                if self._room.in_place:
                    self._pause()
                return m.Prepared(attempt, self._transport.prepare(job, self._room))
            case m.Transfer(attempt, endpoints):
                start = time.monotonic()
                self._arrived = self._transport.transfer(job, endpoints)
                return m.Transferred(attempt, (), self._arrived.copied_bytes, time.monotonic() - start)
            case m.Verify(attempt, digests):
                found = target_digests(self._arrived.buffers, job.received(), self._arrived.digests)
                _compare(job.received(), digests, found)
                self._pause()
                return m.Verified(attempt, xxhash.xxh3_128_digest(b"".join(found)))
            case m.Commit(attempt):
                self._installed = True
                self._engine.install(job.version, self._arrived.buffers)
                return m.Committed(attempt)
            case m.Resume(attempt):
                previous, self._room.live = self._room.live, self._arrived.buffers
                self._installed = self._paused = False
                self._engine.resume(job.version)
                paused_s = time.monotonic() - self._paused_at
                del previous  # not earlier: giving back mapped memory takes long, and the engine would wait for it
                self._ends.finish()
                return m.Resumed(attempt, paused_s)
        raise WeightSyncError(f"a receiver does not {effect}")

    def undo(self) -> None:
        self._ends.finish()
        if self._installed and not self._room.in_place:  # in place there is nothing left to go back to
            self._engine.restore(self.machine.version, self._room.live)
        self._installed, self._arrived = False, Arrived({}, 0)
        if not self.machine.rolled_back() and self._paused and self.machine.version is not None:
            self._paused = False
            self._engine.resume(self.machine.version)

    def _pause(self) -> None:
        self._paused, self._paused_at = True, time.monotonic()
        self._engine.pause(self._in_flight)


def _read(connection: wire.Connection, inbox: queue.SimpleQueue[tuple[object, object]]) -> None:
    """Pass on every order, and finally the reason why there are no more."""
    try:
        while True:
            inbox.put((connection, connection.receive(m.Order)))
    except wire.ConnectionLost as error:
        connection.close()
        inbox.put((connection, error))


def _reply(connection: wire.Connection, message: m.Message) -> None:
    with contextlib.suppress(wire.ConnectionLost):  # the reading thread reports it
        connection.send(message)


def _check_sizes(buffers: Buffers, held: Rank) -> None:
    for name, size in held.buffers.items():
        if name not in buffers or buffers[name].numel() != size or buffers[name].element_size() != 1:
            found = tuple(buffers[name].shape) if name in buffers else "nothing"
            raise WeightSyncError(f"buffer {name!r} should hold {size} bytes, there is {found}")


def _compare(batches: list[Batch], sent: tuple[bytes, ...], found: tuple[bytes, ...]) -> None:
    """Raise WeightSyncError naming the tensor of the first copy whose bytes are not the ones sent."""
    copies = [(batch.source, copy) for batch in batches for copy in batch.copies]
    if len(sent) != len(copies):
        raise WeightSyncError(f"{len(sent)} digests were sent for {len(copies)} copies")
    for (source, copy), expected, digest in zip(copies, sent, found, strict=True):
        if expected != digest:
            raise WeightSyncError(
                f"tensor {copy.tensor!r} from trainer-{source}: {copy.nbytes} bytes at {copy.target_offset} of "
                f"{copy.target_buffer!r} have digest {digest.hex()}, sent were {expected.hex()}"
            )
