"""Where an actor runs: its host's address in the cluster, and whether that host sees the files of the run."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from zerokl.orchestrate.errors import UserError


@dataclass(frozen=True)
class Host:
    """``address``: the IP address by which the cluster knows it; ``interface``: the network device that has it."""

    address: str
    interface: str


def here(needed: Sequence[Path]) -> Host:
    """The host of this Ray worker. Raises UserError if it does not see one of the ``needed`` files."""
    import ray

    address = ray.util.get_node_ip_address()
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise UserError(
            f"host {address} of the Ray cluster does not see {', '.join(missing)}",
            "put run.directory and the model into folders that all hosts share",
        )
    return Host(address, interface_of(address))


def interface_of(address: str) -> str:
    """The network device with this IP address. Raises UserError if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address == address for a in addresses):
            return name
    raise UserError(
        f"no network device of this host has the address {address}, by which the Ray cluster knows it",
        "start Ray there with --node-ip-address set to one of the host's own",
    )
