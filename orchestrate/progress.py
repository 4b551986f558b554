"""What a person sees of a run: one line a step, and below it what is being waited for."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

from zerokl.orchestrate.metrics import StepMetrics

# (heading, format) in the order shown; the numbers come from `_cells`
_COLUMNS = ("step", "reward", "tokens/s", "mismatched", "KL", "grad norm", "sync", "step time")
_WIDTHS = (9, 7, 9, 11, 9, 10, 7, 10)


class Progress:
    """Writes to a terminal with a live waiting line, and plain lines anywhere else."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._status: Status | None = None
        self._headed = False

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._status = self.console.status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def waiting(self, what: str, seconds: float) -> None:
        """Name what is being waited for."""
        if self._status:
            self._status.update(f"waiting for {what} ({seconds:.0f} s)")

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, metrics: StepMetrics, steps: int) -> None:
        """The line of a finished step."""
        if not self._headed:
            self.console.print(_line(_COLUMNS), style="bold", markup=False, soft_wrap=True)
            self._headed = True
        clean = metrics.mismatched_tokens == 0
        self.console.print(_line(_cells(metrics, steps)), style=None if clean else "red", markup=False, soft_wrap=True)


def _cells(m: StepMetrics, steps: int) -> tuple[str, ...]:
    return (
        f"{m.step}/{steps}",
        f"{m.reward_mean:.3f}",
        f"{m.tokens_per_s:.0f}",
        f"{m.mismatched_tokens}/{m.tokens}",
        f"{m.kl_k3:.3g}",
        f"{m.grad_norm:.3g}",
        f"{m.sync_s:.2f}s",
        f"{m.step_s:.1f}s",
    )


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
