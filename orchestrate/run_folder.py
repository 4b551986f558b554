"""One folder holds everything of a run; one process at a time may write to it."""

from __future__ import annotations

import fcntl
import glob
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from zerokl.orchestrate.config import Config, load
from zerokl.orchestrate.errors import UserError
from zerokl.orchestrate.files import new_folder, write_text
from zerokl.orchestrate.metrics import FILE as METRICS

# Settings that change no bit of the training: free to differ when a run is resumed.
_FREE = {"train.steps", "train.threads", "rollout.threads"}
_FREE_TABLES = {"control", "run", "weightsync"}
_STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the step it was taken after, and the digest of the weights it holds."""

    folder: Path
    step: int
    weights_digest: dict[str, str]

    @property
    def policy(self) -> Path:
        return self.folder / "policy"


def locate(pattern: str, *, resume: bool) -> Path:
    """The folder that `run.directory` names. `{time}` in it gives every run one of its own; with `resume`, the newest.

    Raises UserError where there is nothing to resume.
    """
    if "{time}" not in pattern:
        return Path(pattern).resolve()
    if not resume:
        return Path(pattern.replace("{time}", time.strftime("%Y%m%d-%H%M%S"))).resolve()
    before, _, after = pattern.partition("{time}")
    found = sorted(Path(path) for path in glob.glob(f"{glob.escape(before)}*{glob.escape(after)}"))
    if not found:
        raise UserError(f"no run matches {pattern}", "leave out --resume, or name the folder with run.directory")
    return found[-1].resolve()


class RunFolder:
    """The open, locked folder of a run. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Create the folder where absent and lock it. Raises UserError where another process holds the lock."""
        self.path = path
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file", "choose another run.directory")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: TextIO = (path / "lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}", "choose another run.directory") from error
        try:
            # the kernel drops the lock with the process, however it ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(
                f"another run is writing to {path}", "wait for it, or choose another run.directory"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    @property
    def logs(self) -> Path:
        (self.path / "logs").mkdir(exist_ok=True)
        return self.path / "logs"

    def begin(self, config: Config, *, resume: bool) -> Checkpoint | None:
        """Check that this folder may hold this run, write the resolved config, return where to continue from.

        A folder with a run in it needs `resume`, and then the same recipe (up to settings that change no bit).
        """
        recorded = self.path / "config.toml"
        if (self.path / METRICS).exists() and not resume:
            raise UserError(f"{self.path} already holds a run", "continue it with --resume, or set run.directory")
        if resume and not recorded.exists():
            raise UserError(f"{self.path} holds no run to resume", "leave out --resume")
        if resume and (changes := _differences(load(recorded), config)):
            listing = "\n".join(f"  - {change}" for change in changes)
            raise UserError(
                f"the recipe differs from the run in {self.path}:\n{listing}", "resume with the same recipe"
            )
        for torn in (self.path / "checkpoints").glob(".step-*"):  # an earlier process died while writing it
            shutil.rmtree(torn)
        write_text(recorded, to_toml(config))
        return self.latest() if resume else None

    def checkpoint_folder(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Checkpoint]:
        """All complete checkpoints, oldest first. A folder still being written has a hidden name and no state."""
        found = []
        for state in sorted((self.path / "checkpoints").glob(f"step-*/{_STATE}")):
            value = json.loads(state.read_text(encoding="utf-8"))
            found.append(Checkpoint(state.parent, int(value["step"]), value["weights_digest"]))
        return found

    def latest(self) -> Checkpoint | None:
        return next(reversed(self.checkpoints()), None)

    def new_checkpoint(self, step: int, save: Any, *, keep: int) -> Checkpoint:
        """`save(folder)` writes the policy and returns its weights' digest; older ones beyond `keep` are removed."""
        target = self.checkpoint_folder(step)
        with new_folder(target) as fresh:
            digest = save(fresh / "policy")
            write_text(fresh / _STATE, json.dumps({"step": step, "weights_digest": digest}, indent=1) + "\n")
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old.folder)
        return Checkpoint(target, step, digest)


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML: running it again is the same run."""
    lines = ["# The resolved recipe of this run: defaults filled in, overrides applied."]
    for table, values in config.model_dump(mode="json").items():
        lines += ["", f"[{table}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _differences(recorded: Config, wanted: Config) -> list[str]:
    before, after = recorded.model_dump(mode="json"), wanted.model_dump(mode="json")
    return [
        f"{table}.{key}: the run has {before[table][key]!r}, the recipe {after[table][key]!r}"
        for table in after
        if table not in _FREE_TABLES or table == "run"
        for key in after[table]
        if before[table][key] != after[table][key] and f"{table}.{key}" not in _FREE
        if table not in _FREE_TABLES or key == "seed"
    ]
