"""Publishing and opening shared weights: what is written arrives, and nothing else is accepted."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zerokl.weightsync.digest import tensor_digest
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.shared import ALIGNMENT, Manifest, open_shared, publish


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(7, 5, generator=generator).bfloat16(),
        "b.weight": torch.randn(64, 3, generator=generator).bfloat16().T,  # not contiguous
        "scalar": torch.tensor(1.5),
        "c.bias": torch.randn(11, generator=generator),
    }


@pytest.fixture
def published(tensors, tmp_path):
    with publish(tensors.items(), version="v1", directory=tmp_path) as manifest:
        yield manifest


def refused(manifest: Manifest, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message), open_shared(manifest):
        pass


def test_tensors_arrive_as_they_were(published, tensors):
    received = Manifest.from_dict(json.loads(published.to_json()))
    assert received == published
    with open_shared(received) as views:
        assert list(views) == list(tensors)
        assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert received.digests == {name: tensor_digest(t.contiguous()) for name, t in tensors.items()}


def test_the_file_is_private_aligned_and_removed(tensors, tmp_path):
    with publish(tensors.items(), version="v1", directory=tmp_path) as manifest:
        status = os.stat(manifest.path)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_size == manifest.total_bytes
        assert all(entry.offset % ALIGNMENT == 0 for entry in manifest.tensors)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_after_an_error(tensors, tmp_path):
    with pytest.raises(KeyError), publish(tensors.items(), version="v1", directory=tmp_path):
        raise KeyError
    doubled = [*tensors.items(), ("a.weight", tensors["a.weight"])]
    with (
        pytest.raises(WeightSyncError, match=r"'a.weight' is given twice"),
        publish(doubled, version="v", directory=tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [([], "no tensors"), ([("x", torch.zeros(3, dtype=torch.int64))], r"'x': dtype torch.int64 is not supported")],
)
def test_unsupported_tensors_are_refused(bad, message, tmp_path):
    with pytest.raises(WeightSyncError, match=message), publish(bad, version="v", directory=tmp_path):
        pass


@pytest.mark.parametrize("position", [0, 17, -1])
def test_any_flipped_byte_is_refused(published, position):
    entry = published.tensors[1]
    path = Path(published.path)
    data = bytearray(path.read_bytes())
    data[entry.offset + position % entry.nbytes] ^= 0x10
    path.write_bytes(data)
    refused(published, r"'b.weight': digest .* corrupted")


def test_another_file_in_its_place_is_refused(published):
    path = Path(published.path)
    path.write_bytes(bytes(16) + path.read_bytes()[16:])
    refused(published, "another nonce")
    path.write_bytes(path.read_bytes()[:-1])
    refused(published, rf"{published.total_bytes - 1} bytes, expected {published.total_bytes}")
    path.unlink()
    refused(published, "cannot open shared weights")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 1 << 40}, "outside the file"),
        ({"offset": 0}, "outside the file"),
        ({"shape": (7, 6)}, "do not hold"),
        ({"shape": (-7, -5)}, "negative size"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_a_manifest_cannot_reach_outside(published, change, message):
    entry = replace(published.tensors[0], **change)
    refused(replace(published, tensors=(entry, *published.tensors[1:])), f"'a.weight': .*{message}")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("nonce"),
        lambda data: data.update(total_bytes="12"),
        lambda data: data["tensors"][0].update(offset=1.5),
        lambda data: data["tensors"][0].update(shape="7"),
        lambda data: data.update(tensors=3),
    ],
)
def test_a_malformed_manifest_is_refused(published, damage):
    data = json.loads(published.to_json())
    damage(data)
    with pytest.raises(WeightSyncError, match="malformed manifest"):
        Manifest.from_dict(data)
