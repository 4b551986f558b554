"""What actors and driver say of the hosts of a running cluster; a stand-in for Ray, the real one in tests/e2e."""

import sys
from types import SimpleNamespace

import pytest

from zerokl.orchestrate import cluster, hosts
from zerokl.orchestrate.errors import UserError


@pytest.fixture
def ray(monkeypatch):
    """A Ray of 4 CPUs whose node is known as 127.0.0.1."""
    stand_in = SimpleNamespace(
        util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"),
        init=lambda **_: None, cluster_resources=lambda: {"CPU": 4.0}, exceptions=SimpleNamespace(RayError=OSError),
        shutdown=lambda: None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return stand_in


def test_an_actor_names_its_address_and_device(ray, tmp_path):
    assert hosts.here([tmp_path]) == hosts.Host("127.0.0.1", "lo")


def test_files_that_are_not_shared_are_named(ray, tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1 of the Ray cluster does not see \S+/absent\n"):
        hosts.here([tmp_path, tmp_path / "absent"])


def test_an_address_of_no_device_is_refused():
    with pytest.raises(UserError, match=r"no network device of this host has the address 192\.0\.2\.7"):
        hosts.interface_of("192.0.2.7")


def test_a_cluster_that_does_not_answer_is_named(ray, tmp_path):
    def refuse(**_):
        raise ConnectionError("nobody there\nand more")

    ray.init = refuse
    with (
        pytest.raises(UserError, match=r"cannot join the Ray cluster at h:6379: nobody there\n"),
        cluster.cluster(tmp_path, cpus=1, address="h:6379"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_too_small_is_refused_before_anything_starts(ray, tmp_path):
    with (
        pytest.raises(UserError, match="the run claims 5 CPUs, the Ray cluster at h:6379 has 4"),
        cluster.cluster(tmp_path, cpus=5, address="h:6379"),
    ):
        pass
    with cluster.cluster(tmp_path, cpus=4, address="h:6379") as scratch:
        assert scratch.parent == tmp_path
        assert scratch.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
