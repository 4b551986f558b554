"""The adapter for Mooncake's transfer engine. Without the package: that it says so, and what it tells the engine, on a
stand-in for the engine that copies by address. With it: the same transfers over TCP."""

import ctypes
import importlib.util
import sys
import types

import pytest
from parties import Parties

from zerokl.weightsync.megatron_layout import MegatronSizes
from zerokl.weightsync.sglang_layout import SglangSizes
from zerokl.weightsync.transports import mooncake
from zerokl.weightsync.transports.base import TransferError

INSTALLED = importlib.util.find_spec("mooncake") is not None
TRAINER, ROLLOUT = MegatronSizes(tp=2, vocabulary_multiple=4), SglangSizes(tp=2)


class TransferEngine:
    """Writes within this process, into registered memory only."""

    registered: dict[int, int] = {}  # noqa: RUF012
    written = 0
    refuse = False

    def initialize(self, host, metadata, protocol, devices):  # noqa: ARG002
        return int(protocol != "tcp")

    def get_rpc_port(self):
        return 1

    def batch_register_memory(self, places, sizes):
        self.registered.update(zip(places, sizes, strict=True))
        return 0

    def batch_unregister_memory(self, places):
        return -1 if [self.registered.pop(place, None) for place in places].count(None) else 0

    def batch_transfer_sync_write(self, server, here, there, sizes):
        assert server == "127.0.0.1:1"
        for source, target, size in zip(here, there, sizes, strict=True):
            for place in (source, target):
                if not any(a <= place and place + size <= a + n for a, n in self.registered.items()):
                    return -1
            ctypes.memmove(target, source, size)
            TransferEngine.written += size
        return -int(self.refuse)


@pytest.fixture(params=["stand-in", "real"] if INSTALLED else ["stand-in"])
def parties(request, tmp_path, monkeypatch):
    if request.param == "stand-in":
        module = types.ModuleType("mooncake.engine")
        module.TransferEngine = TransferEngine
        monkeypatch.setitem(sys.modules, "mooncake", types.ModuleType("mooncake"))
        monkeypatch.setitem(sys.modules, "mooncake.engine", module)
    sources, targets = ([end() for _ in range(2)] for end in (mooncake.MooncakeSource, mooncake.MooncakeTarget))
    run = Parties(tmp_path, sources, targets, trainer=TRAINER, rollout=ROLLOUT)
    yield run
    run.close()


def test_every_rank_gets_every_version(parties):
    for version in range(4):
        outcome = parties.sync(f"v{version}", seed=version)
        assert outcome.committed, outcome.cause
        assert parties.serving() == [f"v{version}"] * 2
        assert parties.all_hold(version)
    assert outcome.copied_bytes == outcome.bytes
    assert TransferEngine.registered == {}


def test_a_refused_write_aborts(parties, monkeypatch):
    assert parties.sync("v1", seed=1).committed
    monkeypatch.setattr(parties.receivers[1]._transport._engine, "server", "127.0.0.1:9")
    if isinstance(parties.sources[0]._transport._engine.api, TransferEngine):
        monkeypatch.setattr(TransferEngine, "refuse", True)
        monkeypatch.setattr(parties.receivers[1]._transport._engine, "server", "127.0.0.1:1")
    outcome = parties.sync("v2", seed=2)
    assert (outcome.committed, outcome.failed_in) == (False, "transfer")
    assert "the write to rollout-" in outcome.cause
    assert parties.serving() == ["v1", "v1"]
    assert parties.all_hold(1)
    monkeypatch.undo()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(TransferError, match=r"cannot load its package .* pip install mooncake-transfer-engine"):
        mooncake.MooncakeTarget()


def test_an_engine_that_does_not_start_is_named(monkeypatch):
    module = types.ModuleType("mooncake.engine")
    module.TransferEngine = TransferEngine
    monkeypatch.setitem(sys.modules, "mooncake", types.ModuleType("mooncake"))
    monkeypatch.setitem(sys.modules, "mooncake.engine", module)
    with pytest.raises(TransferError, match="does not start on 'h' with protocol 'carrier pigeon'"):
        mooncake.MooncakeTarget("h", protocol="carrier pigeon")
