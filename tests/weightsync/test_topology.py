"""Which transport is chosen, over every combination of places; and what is said of those that cannot work."""

import itertools
import sys

import pytest
import torch

from zerokl.weightsync import place
from zerokl.weightsync.ends import Ends, Site, source_end, source_ends, target_end, target_ends
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.topology import AUTO, TRANSPORTS, Place, Unfit, choose
from zerokl.weightsync.transports.base import TransferError

PLAIN = ("ipc", "disk", "collective")
NIXL = (*PLAIN, "rdma")
GPU = (*NIXL, "cuda_ipc")


def on_host(host="a", transports=NIXL, card=False):
    return Place(host, card=card, transports=transports)


def on_gpu(uuid, host="a", *, reaches=None, transports=GPU, card=False):
    return Place(host, uuid, (uuid,) if reaches is None else reaches, card, transports)


CHOSEN = {
    "one host, CPU": ([on_host()], [on_host()] * 2, "ipc"),
    "one host, CPU, with a card": ([on_host(card=True)], [on_host(card=True)], "ipc"),
    "one GPU shared by both": ([on_gpu("0")], [on_gpu("0")], "cuda_ipc"),
    "two GPUs, open to each other": ([on_gpu("0")], [on_gpu("1", reaches=("0", "1"))], "cuda_ipc"),
    "two GPUs, closed to each other": ([on_gpu("0")], [on_gpu("1")], "collective"),
    "two senders, one of them out of reach": (
        [on_gpu("0"), on_gpu("1")], [on_gpu("2", reaches=("1", "2")), on_gpu("3", reaches=("0", "1", "3"))],
        "collective",
    ),
    "two hosts, NIXL and cards": ([on_host("a", card=True)], [on_host("b", card=True)], "rdma"),
    "two hosts, GPUs, NIXL and cards": ([on_gpu("0", "a", card=True)], [on_gpu("1", "b", card=True)], "rdma"),
    "two hosts, one without a card": ([on_host("a", card=True)], [on_host("b")], "collective"),
    "two hosts, one without NIXL": (
        [on_host("a", card=True)], [on_host("b", PLAIN, card=True)], "collective",
    ),
    "two hosts, no NIXL": ([on_host("a", PLAIN)], [on_host("b", PLAIN)], "collective"),
    "two hosts, engines on both": ([on_host("a", card=True)], [on_host("a"), on_host("b", card=True)], "collective"),
    "trainer on the CPU, engine on a GPU": ([on_host()], [on_gpu("0")], "rdma"),
    "trainer on a GPU, engine on the CPU, two hosts": ([on_gpu("0", "a")], [on_host("b")], "rdma"),
    "one end brought along by each": ([on_host(transports=("disk",))], [on_host(transports=("disk",))], "disk"),
    "one end brought along by one": ([on_host(transports=("ipc",))], [on_host()], "ipc"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOSEN)
def test_the_places_decide(case):
    sources, targets, expected = CHOSEN[case]
    choice = choose(AUTO, sources, targets)
    assert choice.transport == expected
    assert choice.reason
    assert choose(expected, sources, targets).reason == "asked for by name" or case.startswith("one end")


def test_whatever_is_chosen_would_also_be_taken_by_name():
    """Every pair of these, one of each side: what is chosen fits, and disk and mooncake never are."""
    some = [
        Place(host, memory, reaches, card, transports)
        for host, card in itertools.product("ab", (False, True))
        for memory, reaches in (("cpu", ()), ("0", ("0",)), ("1", ("0", "1")))
        for transports in (PLAIN, NIXL, GPU, TRANSPORTS)
    ]
    seen = set()
    for source, target in itertools.product(some, some):
        try:
            name = choose(AUTO, [source], [target]).transport
        except Unfit:  # nothing at all fits, but perhaps a folder
            assert all(refused(name, [source], [target]) for name in TRANSPORTS if name not in ("disk", "mooncake"))
        else:
            seen.add(name)
            assert choose(name, [source], [target]).transport == name
    assert seen == {"ipc", "cuda_ipc", "collective", "rdma"}


def refused(name, sources, targets):
    try:
        choose(name, sources, targets)
    except Unfit:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "sources", "targets", "cause", "remedy"),
    [
        ("ipc", [on_host("a")], [on_host("b")], "ipc works within one host", '"rdma"'),
        ("ipc", [on_host()], [on_gpu("0")], "ipc moves host memory, and there are weights on a GPU", '"cuda_ipc"'),
        ("disk", [on_gpu("0")], [on_gpu("0")], "disk moves host memory", '"cuda_ipc"'),
        ("cuda_ipc", [on_host(transports=GPU)], [on_gpu("0")], "and there are weights in host memory", '"ipc"'),
        ("cuda_ipc", [on_gpu("0")], [on_gpu("1")], "a receiver's GPU cannot open", '"collective"'),
        ("cuda_ipc", [on_gpu("0", "a")], [on_gpu("0", "b")], "cuda_ipc works within one host", '"rdma"'),
        ("cuda_ipc", [on_host()], [on_host()], "not every participant has what it needs", "a GPU that torch sees"),
        ("rdma", [on_host()], [on_host(transports=PLAIN)], "not every participant", "pip install nixl-cu12"),
        ("mooncake", [on_host()], [on_host()], "not every participant", "libibverbs"),
        ("mooncake", [on_host("a", TRANSPORTS)], [on_host("b", TRANSPORTS)], "mooncake works within one", '"rdma"'),
        ("collective", [on_gpu("0")], [on_gpu("0")], "takes each GPU once", '"cuda_ipc"'),
        ("collective", [on_host()], [on_gpu("0")], "moves memory of one kind", '"rdma"'),
        ("smoke", [on_host()], [on_host()], "'smoke' is not known", "known are auto, ipc"),
        (AUTO, [on_host("a", PLAIN)], [on_gpu("0", "b")], "no transport works between all", "pip install nixl-cu12"),
    ],
)
def test_what_cannot_work_is_refused_with_cause_and_remedy(name, sources, targets, cause, remedy):
    with pytest.raises(Unfit) as refusal:
        choose(name, sources, targets)
    assert cause in refusal.value.cause
    assert remedy in refusal.value.remedy


def test_a_place_says_what_is_there(monkeypatch, tmp_path):
    found = place.here(torch.device("cpu"))
    assert (found.memory, found.reaches) == ("cpu", ())
    assert found == place.here(torch.device("cpu")), "two looks at one place"
    assert set(PLAIN) <= set(found.transports)
    assert ("cuda_ipc" in found.transports) == torch.cuda.is_available()
    monkeypatch.setattr(place, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(place, "MOONCAKE", "no_such_package")
    assert not {"rdma", "mooncake"} & set(place.here(torch.device("cpu")).transports)
    assert not place.has_card(tmp_path)
    for port, state in (("1", "1: DOWN"), ("2", "4: ACTIVE")):
        folder = tmp_path / "mlx5_0" / "ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
        assert place.has_card(tmp_path) == (port == "2")


def test_ends_are_built_when_they_are_chosen_and_kept(tmp_path):
    site = Site(tmp_path, (1, 1), torch.device("cpu"))
    for ends in (source_ends(site), target_ends(site)):
        with pytest.raises(WeightSyncError, match="no transport has been chosen"):
            _ = ends.current
        ends.finish()
        for name in ("ipc", "disk", "collective"):
            ends.use(name)
            first = ends.current
            ends.use(name)
            assert ends.current is first
            assert first.name == name
        with pytest.raises(WeightSyncError, match="'smoke' is not one of ipc, disk"):
            ends.use("smoke")
    only = Ends.only(source_end("disk", site))
    assert only.place.transports == ("disk",)
    with pytest.raises(WeightSyncError, match="'ipc' is not one of disk"):
        only.use("ipc")


@pytest.mark.parametrize("make", [source_end, target_end])
def test_an_end_without_its_package_or_gpu_says_what_it_needs(make, monkeypatch, tmp_path):
    site = Site(tmp_path, (1, 1), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(TransferError, match=r"cannot load its package .*pip install mooncake-transfer-engine"):
        make("mooncake", site)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TransferError, match="the cuda_ipc transport needs"):
        make("cuda_ipc", site)
    with pytest.raises(WeightSyncError, match="'smoke' is not known"):
        make("smoke", site)
