"""Safetensors files written one tensor at a time: the library's own bytes, and nothing missing or out of place."""

import pytest
import torch
from safetensors.torch import save_file

from zerokl.alignment.megatron import streams
from zerokl.alignment.megatron.model_config import ModelError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.arange(5).bfloat16(),
    "c": torch.arange(24).bfloat16().view(4, 3, 2),
}
EMPTY = {name: torch.empty_like(tensor, device="meta") for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_the_librarys(tmp_path, metadata):
    streams.write(tmp_path / "ours", EMPTY, iter(TENSORS.items()), metadata)
    streams.write(tmp_path / "backwards", EMPTY, reversed(TENSORS.items()), metadata)
    save_file(TENSORS, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "backwards").read_bytes() == (tmp_path / "theirs").read_bytes()
    with streams.Reader(tmp_path / "ours") as read:
        assert set(read) == set(TENSORS)
        assert len(read) == 3
        assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
        with pytest.raises(KeyError):
            read["d"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": TENSORS["a"]}, r"d torch\.bfloat16 \(5,\) has no place"),
        ({"a": TENSORS["a"][:4]}, r"a torch\.bfloat16 \(4,\) has no place"),
        ({"a": TENSORS["a"].float()}, r"a torch\.float32 \(5,\) has no place"),
    ],
)
def test_what_has_no_place(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        streams.write(tmp_path / "file", EMPTY, (TENSORS | change).items())


def test_what_never_came_or_came_twice(tmp_path):
    with pytest.raises(ValueError, match="2 tensors never came, b among them"):
        streams.write(tmp_path / "file", EMPTY, [("a", TENSORS["a"])])
    with pytest.raises(ValueError, match="has no place"):
        streams.write(tmp_path / "file", EMPTY, [*TENSORS.items(), ("a", TENSORS["a"])])


def test_other_ranks_only_ask(tmp_path):
    asked = []
    streams.write(None, EMPTY, ((asked.append(name), tensor) for name, tensor in TENSORS.items()))
    assert len(asked) == 3


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "bad").write_bytes(b"\xff" * 16)
    with pytest.raises(ModelError, match="bad is truncated or damaged"):
        streams.Reader(tmp_path / "bad")
