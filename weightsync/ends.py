"""A participant's end of whatever transport is chosen when all have joined (`topology`).

Each transport is imported when it is asked for: some need a package that is not always there. Those that use
a network listen on the site's interface; `rdma` on every device where there are RDMA cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from zerokl.weightsync import place
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.topology import TRANSPORTS, Place
from zerokl.weightsync.transports.base import Source, Target

End = TypeVar("End", Source, Target)


@dataclass(frozen=True)
class Site:
    """What ends are built with. ``folder``: of this user alone, the same for all; ``ranks``: how many send and receive;
    ``device``: where this participant's weights are; ``interface``: the network device to listen on; ``one_host``:
    all are on this one, so ``folder`` may hold sockets."""

    folder: Path
    ranks: tuple[int, int]
    device: torch.device
    interface: str = "lo"
    one_host: bool = True

    @property
    def ucx_interface(self) -> str:
        """The network device that UCX may use; empty, all of them, where there are RDMA cards: those have names of
        their own."""
        return "" if place.has_card() else self.interface


class Ends(Generic[End]):
    """The ends that a participant can have; ``current`` is the one in use. ``place``: what it says when it joins."""

    def __init__(self, where: Place, build: Callable[[str], End]) -> None:
        self.place = where
        self._build: Callable[[str], End] = build
        self._current: End | None = None

    @staticmethod
    def only(end: End) -> Ends[End]:
        """One end that is there already, for weights in host memory."""
        ends = Ends(place.here(torch.device("cpu"), only=end.name), lambda _: end)
        ends.use(end.name)
        return ends

    @property
    def current(self) -> End:
        if self._current is None:
            raise WeightSyncError("no transport has been chosen yet")
        return self._current

    def use(self, name: str) -> None:
        """Make that transport's end the current one; built if another one was. Raises WeightSyncError if it cannot."""
        if name not in self.place.transports:
            raise WeightSyncError(f"transport {name!r} is not one of {', '.join(self.place.transports)}")
        if self._current is None or self._current.name != name:
            self.finish()
            self._current = self._build(name)

    def finish(self) -> None:
        """The attempt is over: the current end lets go of everything, if there is one."""
        if self._current is not None:
            self._current.finish()


def source_ends(site: Site) -> Ends[Source]:
    """A sending rank's."""
    return Ends(place.here(site.device), lambda name: source_end(name, site))


def target_ends(site: Site) -> Ends[Target]:
    """A receiving rank's."""
    return Ends(place.here(site.device), lambda name: target_end(name, site))


def source_end(name: str, site: Site) -> Source:
    """A sending rank's end. Raises WeightSyncError for a transport that is not one of `TRANSPORTS`, or that lacks what
    it needs."""
    match name:
        case "ipc":
            from zerokl.weightsync.transports.ipc import IpcSource

            return IpcSource(site.folder if site.one_host else None)
        case "disk":
            from zerokl.weightsync.transports.disk import DiskSource

            return DiskSource(site.folder / "versions")
        case "rdma":
            from zerokl.weightsync.transports.rdma import RdmaSource

            return RdmaSource(interface=site.ucx_interface)
        case "collective":
            from zerokl.weightsync.transports.collective import CollectiveSource

            return CollectiveSource(site.folder, ranks=site.ranks, interface=site.interface, device=site.device)
        case "cuda_ipc":
            from zerokl.weightsync.transports.cuda_driver import CudaDriver
            from zerokl.weightsync.transports.cuda_ipc import CudaIpcSource

            return CudaIpcSource(CudaDriver(site.device.index or 0))
        case "mooncake":
            from zerokl.weightsync.transports.mooncake import MooncakeSource

            return MooncakeSource()
    raise _unknown(name)


def target_end(name: str, site: Site) -> Target:
    """A receiving rank's end; see `source_end`. Weights on a GPU arrive there by `rdma`, `collective`, `cuda_ipc`."""
    gpu = site.device if site.device.type == "cuda" else None
    match name:
        case "ipc":
            from zerokl.weightsync.transports.ipc import IpcTarget

            return IpcTarget()
        case "disk":
            from zerokl.weightsync.transports.disk import DiskTarget

            return DiskTarget()
        case "rdma":
            from zerokl.weightsync.transports.rdma import RdmaTarget

            return RdmaTarget(interface=site.ucx_interface, device=gpu)
        case "collective":
            from zerokl.weightsync.transports.collective import CollectiveTarget

            return CollectiveTarget(site.folder, ranks=site.ranks, interface=site.interface, device=site.device)
        case "cuda_ipc":
            from zerokl.weightsync.transports.cuda_driver import CudaDriver
            from zerokl.weightsync.transports.cuda_ipc import CudaIpcTarget

            return CudaIpcTarget(CudaDriver(site.device.index or 0))
        case "mooncake":
            from zerokl.weightsync.transports.mooncake import MooncakeTarget

            return MooncakeTarget()
    raise _unknown(name)


def _unknown(name: str) -> WeightSyncError:
    return WeightSyncError(f"transport {name!r} is not known; known are {', '.join(TRANSPORTS)}")
