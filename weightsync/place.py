"""What a participant says of where it is (`topology.Place`), looked up on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from zerokl.weightsync import topology
from zerokl.weightsync.topology import Place
from zerokl.weightsync.transports.rdma import PACKAGES

MOONCAKE = "mooncake"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FILES = Path("/proc/self/ns/mnt")
_CARDS = Path("/sys/class/infiniband")


def here(device: torch.device, *, only: str | None = None) -> Place:
    """This process's place, with its weights on ``device``; ``only``: the one transport it brings along, if so."""
    memory, reaches = _gpu(device) if device.type == "cuda" else (topology.HOST_MEMORY, ())
    transports = tuple(name for name in topology.TRANSPORTS if available(name)) if only is None else (only,)
    return Place(_host(), memory, reaches, has_card(), transports)


def _host() -> str:
    """One boot of one kernel, and one view of its files: containers that do not share them hand nothing over."""
    return f"{_BOOT_ID.read_text().strip()}/{_FILES.stat().st_ino}"


def available(name: str) -> bool:
    """Whether this process has what a transport needs: its package, or a GPU."""
    match name:
        case "rdma":
            return any(importlib.util.find_spec(package) for package in PACKAGES)
        case "mooncake":
            return importlib.util.find_spec(MOONCAKE) is not None
        case "cuda_ipc":
            return torch.cuda.is_available()
    return name in topology.TRANSPORTS


def has_card(folder: Path = _CARDS) -> bool:
    """Whether an RDMA-capable network card has a link that is up."""
    return any("ACTIVE" in state.read_text() for state in folder.glob("*/ports/*/state"))


def _gpu(device: torch.device) -> tuple[str, tuple[str, ...]]:
    """A GPU's UUID, and those of all whose memory it can open. Has not run on a GPU."""
    own, uuids = device.index or 0, [_uuid(i) for i in range(torch.cuda.device_count())]
    return uuids[own], tuple(
        uuid for i, uuid in enumerate(uuids) if i == own or torch.cuda.can_device_access_peer(own, i)
    )


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
