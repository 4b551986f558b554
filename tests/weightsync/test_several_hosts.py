"""Participants that meet by TCP, at the address that a shared file tells. Real hosts: tests/e2e/test_two_hosts.py."""

import json
import os
import socket
import struct
import time
from unittest.mock import Mock

import fused_model
import psutil
import pytest
from parties import TOKEN, Parties, eventually

from zerokl.weightsync import place, sglang_receiver, wire
from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.transports import rdma
from zerokl.weightsync.transports.ipc import IpcSource, IpcTarget

HOSTS = ["127.0.0.1", "::1"]


def has(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex((host, 9)) != 99  # EADDRNOTAVAIL


@pytest.mark.parametrize("host", [host for host in HOSTS if has(host)])
def test_weights_come_and_a_coordinator_that_comes_back_elsewhere_is_found(tmp_path, host):
    run = Parties(tmp_path, [IpcSource(None)], [IpcTarget()], host=host)
    address = tmp_path / "s"
    try:
        assert run.sync("v1", seed=1).committed
        told = json.loads(address.read_text())
        assert told == {"host": host, "port": run.sender._socket.getsockname()[1]}
        assert address.stat().st_mode & 0o777 == 0o600
        run.sender.close()
        assert not address.exists()
        run.sender = WeightSender(address, TOKEN, sources=1, receivers=1, host=host)
        run.sender.wait(30)
        assert json.loads(address.read_text())["port"] != told["port"]
        assert run.sync("v2", seed=2).committed
        assert run.serving() == ["v2"]
        assert run.all_hold(2)
    finally:
        run.close()


def test_it_listens_where_it_was_told_and_tells_no_stranger_anything(tmp_path):
    tmp_path.chmod(0o700)
    address = tmp_path / "s"
    with WeightSender(address, TOKEN, sources=1, receivers=1, host="127.0.0.1") as sender:
        assert sender._socket.getsockname()[0] == "127.0.0.1"
        mute = wire.connect(address, 5)
        for garbage in (b"\xff" * 64, struct.pack("<I", 5) + b"hello", b"GET / HTTP/1.1\r\n\r\n"):
            with wire._dial(address) as stranger:
                stranger.sendall(garbage)
        wrong = wire.connect(address, 5)
        with pytest.raises(wire.ConnectionLost):
            wire.introduce(wrong, bytes(32), source=True, rank=0, deadline=time.monotonic() + 5)
        honest = wire.connect(address, 5)
        wire.introduce(honest, TOKEN, source=True, rank=0, deadline=time.monotonic() + 5)
        assert sender.missing
        for connection in (mute, wrong, honest):
            connection.close()


def test_one_coordinator_at_a_time_and_a_dead_one_is_replaced(tmp_path):
    tmp_path.chmod(0o700)
    address = tmp_path / "s"
    with WeightSender(address, TOKEN, sources=1, receivers=1, host="127.0.0.1"):
        for host in ("", "127.0.0.1"):
            with pytest.raises(WeightSyncError, match="another coordinator listens"):
                WeightSender(address, TOKEN, sources=1, receivers=1, host=host)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    address.write_text(json.dumps({"host": "127.0.0.1", "port": port}))
    with WeightSender(address, TOKEN, sources=1, receivers=1, host="127.0.0.1"):
        wire.connect(address, 5).close()


@pytest.mark.parametrize("text", ["", "{}", '{"host": "", "port": 1}', '{"host": "h", "port": 65536}', "\udcff", "[1]"])
def test_a_file_of_anything_else_is_no_address(tmp_path, text):
    (tmp_path / "s").write_bytes(os.fsencode(text))
    with pytest.raises(wire.ConnectionLost, match="no coordinator at"):
        wire.connect(tmp_path / "s", 0)


def test_a_host_that_is_gone_is_noticed_without_traffic(tmp_path):
    tmp_path.chmod(0o700)
    with WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1, host="127.0.0.1") as sender:
        connection = wire.connect(tmp_path / "s", 5)
        sock = connection._socket
        probes = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in wire._KEEP_ALIVE]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert probes[0] + probes[1] * probes[2] <= 30
        wire.introduce(connection, TOKEN, source=True, rank=0, deadline=time.monotonic() + 5)
        connection.close()
        eventually(lambda: not sender._inbox.empty())


def listening():
    return {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}


def test_rdma_listens_on_the_device_that_it_is_given():
    before = listening()
    end = rdma.RdmaTarget(interface="lo")
    assert {address.ip for address in listening() - before} == {"127.0.0.1"}
    assert end.name == "rdma"  # it lives until here


def test_another_view_of_the_files_is_another_host(tmp_path, monkeypatch):
    here = place._host()
    monkeypatch.setattr(place, "_FILES", tmp_path)
    assert place._host() != here
    assert place._host().split("/")[0] == here.split("/")[0]


def test_an_engine_listens_on_the_device_that_its_settings_name(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def ends(site):
        raise Asked(site.interface, site.folder, site.ranks)

    monkeypatch.setattr(sglang_receiver, "target_ends", ends)
    wire.new_token(tmp_path / "token")
    settings = {"address": f"{tmp_path}/s", "token_file": f"{tmp_path}/token", "engine": 1, "ranks": [2, 3]}
    with pytest.raises(Asked) as asked:
        sglang_receiver.start(fused_model.Model(), "", Mock(), 0, 1, settings | {"interface": "eth7"})
    assert asked.value.args == ("eth7", tmp_path, (2, 3))
