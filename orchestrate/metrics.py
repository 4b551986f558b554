"""What a step leaves behind: a line of `metrics.jsonl` and, on request, TensorBoard scalars (see docs/metrics.md)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerokl.orchestrate.errors import UserError
from zerokl.orchestrate.files import write_text

if TYPE_CHECKING:
    from zerokl.alignment.correction import Diagnostics
    from zerokl.alignment.mismatch import PolicyGap

FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One training step. Every number is a plain float or int; NaN and Inf become null in the file.

    `correction` and `gap`: only with importance weights (recipe table of that name); the former has one column for
    each of its fields, the latter is an object.
    """

    step: int
    reward_mean: float
    reward_std: float
    samples: int
    dropped: int
    informative_groups: int
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    truncated: int
    mismatched_tokens: int
    nonfinite: int
    max_abs_diff: float
    kl_k1: float
    kl_k2: float
    kl_k3: float
    differing_routes: int
    loss: float
    grad_norm: float
    learning_rate: float
    rollout_s: float
    reward_s: float
    train_s: float
    sync_s: float
    step_s: float
    sync_bytes: int
    sync_copied_bytes: int
    sync_engine_copied_bytes: int
    sync_gb_per_s: float
    sync_pause_ms: float
    sync_transport: str
    tokens_per_s: float
    weight_version: str
    correction: Diagnostics | None = None
    gap: PolicyGap | None = None

    def columns(self) -> dict[str, Any]:
        """Name -> value, as recorded."""
        nested = ("correction", "gap")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in nested}
        if self.correction is not None:
            values |= {f"correction_{name}": value for name, value in self.correction.to_dict().items()}
        if self.gap is not None:
            values["gap"] = self.gap.to_dict()
        return values


class MetricsFile:
    """Appends whole lines. A reader, or a crash, never meets half a line that stays: opening repairs the end."""

    def __init__(self, folder: Path, *, keep_through: int) -> None:
        """Keep the lines of steps up to `keep_through` (0: none) and drop everything after them."""
        self.path = folder / FILE
        kept = [line for line in read(folder) if line["step"] <= keep_through] if self.path.exists() else []
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, metrics: StepMetrics) -> None:
        """Write one line and wait until it is on disk."""
        values = {key: _plain(value) for key, value in metrics.columns().items()}
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps recorded in a run folder; an incomplete last line (the machine died) is left out."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} has no {FILE}", "give the folder of a run") from error
    lines = text.split("\n")[:-1]  # what follows the last line break is no whole line
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            value["step"] + 0
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{folder / FILE}, line {number} is damaged", "remove the line") from error
        steps.append(value)
    return steps


class TensorBoard:
    """The same numbers as TensorBoard scalars, under `tensorboard/` of the run folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("run.tensorboard needs the package tensorboard", "pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def append(self, metrics: StepMetrics) -> None:
        for key, value in metrics.columns().items():
            if isinstance(value, int | float) and key != "step" and math.isfinite(value):
                self._writer.add_scalar(key, value, metrics.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
