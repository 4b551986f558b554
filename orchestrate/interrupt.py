"""Ctrl-C during a run: the first asks it to finish the step, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_ANNOUNCEMENT = b"\nstopping after this step and saving a checkpoint; press Ctrl-C again to stop at once\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """True once a stop was asked for. Use as a context manager in the main thread; restores the handlers at the end."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.asked

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal handler's signature
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, _ANNOUNCEMENT)  # no print: the signal may have come in the middle of one
