"""The ways a command can end badly, each turned into an exit code in one place (`cli.main`)."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can fix: bad input, a missing model, an impossible setting. Exit code 2, no traceback.

    ``cause`` says what is wrong, ``remedy`` what to do about it.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}\n  {remedy}" if remedy else cause)
        self.cause, self.remedy = cause, remedy


class RunError(Exception):
    """A run that started and could not finish: a dead engine, a deadline passed, unequal digests. Exit code 1."""


class EngineLost(RunError):
    """The rollout engine died. Another one can take its place."""


class SyncFailed(RunError):
    """New weights did not reach the engine; it serves those from before, or none. It may be tried again."""
