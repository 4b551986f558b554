"""How long a plan would take on given links: a bound from bytes, not a measurement.

Every rank is a GPU of a node. What stays in a node goes over its GPUs' fast links (or its shared memory), the rest over
each GPU's share of the network cards. All links work at once, each in both directions, and nothing else is in the way:
no kernel, no registration, no digest, no congestion. So the result is the least that this plan can take there; it is
reached if the busiest link never waits.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from zerokl.weightsync.plan import Plan


@dataclass(frozen=True)
class Links:
    """GB/s (1e9 bytes) of one direction of each link; infinite ones bound nothing.

    ``nic``: the network, per GPU. ``nvlink``: between GPUs of a node, per GPU. ``pcie``: per GPU, where all its bytes
    are staged in host memory. ``host``: a node's shared memory, for all that stays in the node together. ``write_us``:
    microseconds that a GPU's card takes for each contiguous run of bytes beside the bytes themselves.
    """

    nic: float = math.inf
    nvlink: float = math.inf
    pcie: float = math.inf
    host: float = math.inf
    write_us: float = 0.0
    gpus_per_node: int = 8
    colocated: bool = False
    """Whether trainer rank i and rollout rank i share a node, instead of having nodes of their own."""


@dataclass(frozen=True)
class Prediction:
    """``seconds`` of the busiest link, its name, and all bytes by kind of link."""

    seconds: float
    bottleneck: str
    bytes: dict[str, int]


def predict(plan: Plan, links: Links) -> Prediction:
    """The bound for one plan. Raises ValueError for a speed that is not positive or a node without GPUs."""
    if min(links.nic, links.nvlink, links.pcie, links.host) <= 0 or links.gpus_per_node < 1 or links.write_us < 0:
        raise ValueError(f"speeds and GPUs per node must be positive: {links}")
    load: Counter[tuple[str, str]] = Counter()  # (kind of link, whose) -> bytes
    runs: Counter[tuple[str, str]] = Counter()
    total: Counter[str] = Counter()
    for batch in plan.batches:
        size = batch.nbytes
        ends = f"out of trainer-{batch.source}", f"into rollout-{batch.target}"
        node = batch.source // links.gpus_per_node
        kind = "nvlink" if links.colocated and node == batch.target // links.gpus_per_node else "nic"
        total[kind] += size
        for end in ends:
            load[kind, end] += size
            load["pcie", end] += size
        if kind == "nvlink":
            load["host", f"in node {node}"] += size
        else:
            runs[kind, ends[0]] += sum(copy.rows for copy in batch.copies)
    times = {
        (kind, end): size / getattr(links, kind) / 1e9 + runs[kind, end] * links.write_us / 1e6
        for (kind, end), size in load.items()
    }
    busiest = max(times, key=lambda key: times[key], default=("", "nothing to move"))
    return Prediction(times.get(busiest, 0.0), " ".join(busiest).strip(), dict(total))
