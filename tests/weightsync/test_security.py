"""The promises of SECURITY.md that code can check: words that must not occur, and parsers that take anything."""

import contextlib
import re
import socket
import struct
import threading
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import MODEL, TOKEN

from zerokl.weightsync import messages as m
from zerokl.weightsync import wire
from zerokl.weightsync.channel import WeightSender
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Layout, LayoutError
from zerokl.weightsync.megatron_layout import MegatronSizes, megatron_layout
from zerokl.weightsync.plan import make_plan
from zerokl.weightsync.transports import cuda_ipc, delta, disk, ipc_layout, mooncake, rdma
from zerokl.weightsync.transports.base import TransferError

ROOT = Path(__file__).resolve().parents[2]
OURS = ["kernels", "alignment", "weightsync", "orchestrate", "bench", "zerokl/__init__.py", "setup.py"]
FORBIDDEN = re.compile(
    r"\b(c?pickle|dill|marshal|shelve)\b|torch\.load\b|0\.0\.0\.0|allow_pickle=True|trust_remote_code=True"
    r"|yaml\.load\b|\beval\(|\bexec\("
)
MENTIONS = re.compile(r"no pickle")  # how documentation speaks of it


def sources():
    for name in OURS:
        path = ROOT / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def hits(text: str) -> list[str]:
    return [found.group() for found in FORBIDDEN.finditer(MENTIONS.sub("", text)) if not in_attribute(text, found)]


def in_attribute(text: str, found: re.Match) -> bool:
    """`model.eval(`: a method of that name is no evaluation of code."""
    return found.group() in ("eval(", "exec(") and text[found.start() - 1] == "."


def test_our_own_code_reads_nothing_that_can_carry_code_and_listens_nowhere_open():
    files = list(sources())
    assert len(files) > 80
    assert {str(path): found for path in files if (found := hits(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "pickle.loads(x)",
        "torch.load(p)",
        'bind("0.0.0.0")',
        "eval(x)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert hits(f"x = 1\n{line}\n")


FIELDS = [
    "type",
    "attempt",
    "digests",
    "endpoints",
    "cause",
    "sender",
    "path",
    "nonce",
    "nbytes",
    "buffers",
    "metadata",
    "server",
    "handle",
    "device",
]
scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(FIELDS) | st.text(max_size=5),
            inner | st.sampled_from(["Plan", "Prepare", "Verify", "Hello", "Abort"]),
            max_size=6,
        )
    ),
    max_leaves=12,
)
anything = st.binary(max_size=300) | values.map(msgspec.msgpack.encode)

PARSERS = {
    "orders": lambda data: wire.decode(data, m.Order),
    "answers": lambda data: wire.decode(data, m.Answer),
    "greeting": lambda data: wire.decode(data, m.Hello),
    "join": lambda data: wire.decode(data, m.Join),
    "listening": wire.parse_listening,
    "ipc": ipc_layout.parse_export,
    "ipc holding": lambda data: ipc_layout.parse_holding({"rollout-0": data}, 0),
    "rdma": rdma.parse,
    "mooncake": mooncake.parse,
    "cuda_ipc": cuda_ipc.parse_export,
    "delta": lambda data: delta.decode(data[: len(data) // 2], data[len(data) // 2 :], 64),
}


@pytest.mark.parametrize("parser", PARSERS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=anything)
def test_a_parser_takes_anything_and_raises_one_kind_of_error(parser, data):
    with contextlib.suppress(TransferError, wire.ConnectionLost):
        PARSERS[parser](data)


held = megatron_layout(MODEL, MegatronSizes())
good = m.Plan(bytes(16), "v", held, held, 1.0, "ipc")
GOOD = msgspec.msgpack.encode(good)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(0, len(GOOD)))
def test_a_damaged_plan_is_refused_or_still_a_sound_one(position, flip, length):
    data = bytearray(GOOD)
    data[position] ^= flip
    for body in (data, GOOD[:length]):
        try:
            order = wire.decode(body, m.Order)
        except wire.ConnectionLost:
            continue
        if isinstance(order, m.Plan):
            with contextlib.suppress(LayoutError):
                plan = make_plan(order.sender, order.receiver)
                inside(order.sender, order.receiver, plan)


def inside(sender: Layout, receiver: Layout, plan) -> None:
    """No copy leaves the buffers of the layouts, whatever they said."""
    for batch in plan.batches:
        for c in batch.copies:
            for rank, buffer, offset, pitch in (
                (sender.ranks[batch.source], c.source_buffer, c.source_offset, c.source_pitch),
                (receiver.ranks[batch.target], c.target_buffer, c.target_offset, c.target_pitch),
            ):
                assert offset >= 0
                assert offset + (c.rows - 1) * pitch + c.row_bytes <= rank.buffers[buffer]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=300))
def test_a_manifest_of_anything_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    path.write_bytes(data)
    with pytest.raises(TransferError, match="no manifest"):
        disk.read_manifest(path)


@pytest.mark.parametrize("link", ["../../etc", "/etc", "A" * 32, "0" * 31])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path, link):
    text = f'{{"version": "v", "chain": ["{link}"], "buffers": {{}}, "file_digest": "{"0" * 32}"}}'
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(TransferError, match="no manifest"):
        disk.read_manifest(tmp_path / "m.json")


def test_a_length_alone_allocates_nothing_and_too_much_is_refused():
    ours, theirs = socket.socketpair()
    theirs.sendall(struct.pack("<I", m.MAX_GREETING + 1))
    with pytest.raises(wire.ConnectionLost, match="exceeds the limit of 4096"):
        wire.Connection(ours).receive(m.Hello, m.MAX_GREETING, time.monotonic() + 5)


def test_strangers_that_say_nothing_or_nonsense_hold_nothing_up(tmp_path):
    tmp_path.chmod(0o700)
    with WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1) as sender:
        mute = wire.connect(tmp_path / "s", 5)
        for garbage in (b"\xff" * 64, struct.pack("<I", 5) + b"hello", b"GET / HTTP/1.1\r\n\r\n"):
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(str(tmp_path / "s"))
            stranger.sendall(garbage)
            stranger.close()
        honest = wire.connect(tmp_path / "s", 5)
        wire.introduce(honest, TOKEN, source=True, rank=0, deadline=time.monotonic() + 5)
        assert sender.missing
        mute.close()
        honest.close()


def test_the_socket_belongs_to_its_user_alone_and_to_one_coordinator(tmp_path):
    tmp_path.chmod(0o700)
    with WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        with pytest.raises(Exception, match="another coordinator listens"):
            WeightSender(tmp_path / "s", TOKEN, sources=1, receivers=1)
    assert not (tmp_path / "s").exists()


def test_a_weak_token_is_refused(tmp_path):
    ours, theirs = socket.socketpair()
    threading.Thread(target=lambda: wire.Connection(theirs).send(m.Challenge(bytes(16)))).start()
    with pytest.raises(ValueError, match="at least 32 bytes"):
        wire.introduce(wire.Connection(ours), b"short", source=True, rank=0, deadline=time.monotonic() + 5)


def test_a_token_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "token"
    token = wire.new_token(path)
    assert len(token) == wire.TOKEN_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert wire.read_token(path) == token
    with pytest.raises(FileExistsError):
        wire.new_token(path)
    path.chmod(0o640)
    with pytest.raises(WeightSyncError, match="mode 0600"):
        wire.read_token(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(WeightSyncError, match="cannot read the token file"):
        wire.read_token(tmp_path / "link")
