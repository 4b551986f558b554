"""The transports by name, each imported when it is asked for: one needs a package that is not always there."""

from __future__ import annotations

from pathlib import Path

from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.transports.base import Source, Target

TRANSPORTS = ("ipc", "disk", "rdma", "collective")


def source_end(name: str, folder: Path, ranks: tuple[int, int]) -> Source:
    """A sending rank's end. ``folder``: of this user alone, the same for all; ``ranks``: how many send and receive.

    Raises WeightSyncError for a transport that is not one of `TRANSPORTS`.
    """
    if name == "ipc":
        from zerokl.weightsync.transports.ipc import IpcSource

        return IpcSource(folder)
    if name == "disk":
        from zerokl.weightsync.transports.disk import DiskSource

        return DiskSource(folder / "versions")
    if name == "rdma":
        from zerokl.weightsync.transports.rdma import RdmaSource

        return RdmaSource()
    if name == "collective":
        from zerokl.weightsync.transports.collective import CollectiveSource

        return CollectiveSource(folder, ranks=ranks)
    raise _unknown(name)


def target_end(name: str, folder: Path, ranks: tuple[int, int]) -> Target:
    """A receiving rank's end; see `source_end`."""
    if name == "ipc":
        from zerokl.weightsync.transports.ipc import IpcTarget

        return IpcTarget()
    if name == "disk":
        from zerokl.weightsync.transports.disk import DiskTarget

        return DiskTarget()
    if name == "rdma":
        from zerokl.weightsync.transports.rdma import RdmaTarget

        return RdmaTarget()
    if name == "collective":
        from zerokl.weightsync.transports.collective import CollectiveTarget

        return CollectiveTarget(folder, ranks=ranks)
    raise _unknown(name)


def _unknown(name: str) -> WeightSyncError:
    return WeightSyncError(f"transport {name!r} is not known; known are {', '.join(TRANSPORTS)}")
