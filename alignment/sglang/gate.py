"""Stopping SGLang's scheduler between two steps, for a change of its weights, and starting it again.

Another thread asks; everything happens on the scheduler's own thread, at the top of its loop. Ranks of one engine stop
and start at the same step, as their steps hold collectives: they reduce their wishes there. They stop as soon as one
wishes it, and go on when none does any more. So a rank that gave up a transfer leaves no other waiting for a stop.

What becomes of requests that are being answered when the engine stops:

    abort      they end, with what they have (finish reason ``abort``)
    retract    their cache is dropped; they wait, and go on from what they have under the new weights
    continue   they stay, keys and values of the old weights included, and go on under the new ones
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
from sglang.srt.managers.io_struct import AbortReq, ContinueGenerationReqInput, PauseGenerationReqInput
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from zerokl.alignment.sglang.errors import EngineError, HookError

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_TIMEOUT_S = 20.0
"""How long another thread waits for the scheduler: a step of it, or the other ranks of the engine."""
_PAUSED_POLL_S = 0.005
_MARK = "|zerokl:"
_MODES = ("", "abort", "retract", "continue")
"""Wishes: not to stop, or to stop and what becomes of requests then. The ranks' wishes for one stop are the same."""


class Gate:
    """One engine rank's. ``started`` is called once, with the gate, when the scheduler's loop begins."""

    def __init__(self, started: Callable[[Gate], None]) -> None:
        self._started, self._in_flight = started, "abort"
        self._scheduler: Any = None
        self._version: str | None = None
        self._wish, self._paused = "", False  # the first is set by the other thread, the second by the scheduler's
        self._changed = threading.Condition()
        self._actions: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def install(self) -> None:
        """Put the gate into the loop of this process's scheduler, which is being built. Raises HookError if SGLang has
        no such loop."""
        HookRegistry.register(f"{_SCHEDULER}.ingest_requests", self._before_requests, HookType.BEFORE)
        HookRegistry.register(f"{_SCHEDULER}.handle_generate_request", self._key_request, HookType.BEFORE)
        HookRegistry.apply_hooks()
        for method in (Scheduler.ingest_requests, Scheduler.handle_generate_request):
            if not hasattr(method, "__wrapped__"):  # a failure to apply is only logged
                raise HookError(f"the hook on {method.__qualname__} did not take effect")

    # -- called from the other thread -----------------------------------------------------------------------------

    def pause(self, in_flight: str) -> None:
        """Ask the scheduler to stop before one of its next steps; does not wait. ``in_flight``: abort, retract or
        continue."""
        self._wish = in_flight
        self._ring()

    def run(self, action: Callable[[], None]) -> None:
        """Wait until the scheduler has stopped, then have it call ``action`` inside its weight-update window and drop
        its cache. Raises what that raises, EngineError if the scheduler does not stop in time."""
        self._until(paused=True)
        done: Future[None] = Future()
        self._actions.put((action, done))
        self._ring()
        try:
            done.result(_TIMEOUT_S)
        except TimeoutError:
            if done.cancel():  # it has not begun, and now it never will
                raise EngineError(f"the scheduler changed no weights in {_TIMEOUT_S:g} s") from None
            done.result()

    def resume(self, version: str) -> None:
        """Go on, with ``version`` as the weights of all tokens from here on; waits for it."""
        self._version = version
        self._wish = ""
        self._ring()
        self._until(paused=False)

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def _until(self, *, paused: bool) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._paused == paused, _TIMEOUT_S):
                raise EngineError(f"the scheduler did not {'stop' if paused else 'go on'} in {_TIMEOUT_S:g} s")

    # -- called by the scheduler ----------------------------------------------------------------------------------

    def _before_requests(self, scheduler: Any, *_: Any, **__: Any) -> None:
        """The top of the scheduler's loop: no step is running."""
        if self._scheduler is None:
            self._scheduler = scheduler
            if scheduler.idle_sleeper is not None:  # an idle scheduler waits for sockets, and for this
                scheduler.idle_sleeper.poller.register(self._bell, select.POLLIN)
            self._started(self)
        if self._paused:
            select.select([self._bell], [], [], _PAUSED_POLL_S)  # or a stopped scheduler spins
        if select.select([self._bell], [], [], 0)[0]:
            os.eventfd_read(self._bell)
        wish = _MODES[self._largest(_MODES.index(self._wish))]
        if bool(wish) != self._paused:
            self._stop(wish) if wish else self._go_on()
        while self._paused and not self._actions.empty():
            self._change(*self._actions.get())

    def _largest(self, number: int) -> int:
        """Of the numbers of all ranks of the engine, which ask at the same step."""
        group = self._scheduler.tp_group
        if group.world_size == 1:
            return number
        found = torch.tensor([number])
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
        return int(found)

    def _stop(self, in_flight: str) -> None:
        scheduler = self._scheduler
        # asked of all ranks: one that stopped without the others would wait for them, and they for it
        if in_flight == "abort" and self._largest(int(not scheduler.is_fully_idle())):
            scheduler.abort_request(AbortReq(abort_all=True))  # they end with the next step; then the scheduler stops
            self._ring()  # and does not sleep before
            return
        self._in_flight = in_flight
        mode = "retract" if in_flight == "retract" else "in_place"
        scheduler.pause_generation(PauseGenerationReqInput(mode=mode))
        self._set(paused=True)

    def _go_on(self) -> None:
        scheduler = self._scheduler
        scheduler.record_weight_version_change(new_version=self._version)
        for request in scheduler.waiting_queue:  # they hold no cache yet: let them find none of the old weights
            request.extra_key = self._keyed(request.extra_key)
        scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
        self._set(paused=False)

    def _set(self, *, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def _change(self, action: Callable[[], None], done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            self._in_window(action)
        except Exception as error:  # noqa: BLE001  (raised again by the thread that waits for it)
            done.set_exception(error)
        else:
            done.set_result(None)

    def _in_window(self, action: Callable[[], None]) -> None:
        scheduler = self._scheduler
        updaters = [runner.weight_updater for _, runner in scheduler.tp_worker.weight_update_runners()]
        for updater in updaters:  # what SGLang's own begin_weight_update does on each rank
            updater.begin_weight_update()
        try:
            action()
        finally:
            for updater in updaters:
                updater.end_weight_update(run_post_load=True)
        kept = self._in_flight == "continue" and not scheduler.is_fully_idle(ignore_waiting=True)
        if not kept and not scheduler.flush_cache(empty_cache=False):
            raise EngineError("SGLang did not flush its cache")

    def _key_request(self, _: Any, request: Any, **__: Any) -> None:
        request.extra_key = self._keyed(request.extra_key)

    def _keyed(self, key: str | None) -> str:
        """A cache namespace of the present version: prefixes of others are never found, where any are kept."""
        own = (key or "").partition(_MARK)[0]
        return f"{own}{_MARK}{self._version or ''}"
