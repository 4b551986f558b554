"""What the owner of an engine and the engine's process say to each other.

Frames are an 8-byte little-endian length and a msgpack body; every body is decoded against the message types below, so
nothing but these shapes can cross. No code and no tensors travel; weights come another way (`config.Transfer`).
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Any, Generic, TypeVar

import msgspec

from zerokl.alignment.recorder import Plant
from zerokl.alignment.sglang.config import EngineConfig
from zerokl.alignment.types import Request, WeightSpan

MAX_FRAME = 1 << 30  # 1 GiB: a thousand long requests with their routing; below what could exhaust memory
RAW_LOGPROB = "zerokl_raw_logprob"
"""The key under which SGLang carries each token's raw log-probability in a response's ``meta_info``."""

_LENGTH = struct.Struct("<Q")


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag on the wire."""


class Start(Message, frozen=True):
    config: EngineConfig


class Generate(Message, frozen=True):
    requests: tuple[Request, ...]


class Serving(Message, frozen=True):
    pass


class WeightsDigest(Message, frozen=True):
    pass


class FlipWeightBit(Message, frozen=True):
    name: str
    element: int
    bit: int


class Trace(Message, frozen=True):
    """Record every forward pass from now on into the folder, with one planted fault if given."""

    folder: str
    plant: Plant | None


class FlushCache(Message, frozen=True):
    pass


class Close(Message, frozen=True):
    pass


Command = Start | Generate | Serving | WeightsDigest | FlipWeightBit | Trace | FlushCache | Close


class Ready(Message, frozen=True):
    manifest: dict[str, Any]


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One generation; the log-probabilities are raw little-endian fp32, so their bits arrive as they left, and
    ``routed_experts`` are the bytes of a routing record (`routing_replay.pack`)."""

    output_ids: tuple[int, ...]
    logprobs: bytes
    raw_logprobs: bytes
    finish_reason: str
    weight_version: str
    cached_tokens: int
    routed_experts: bytes | None
    weight_spans: tuple[WeightSpan, ...]


class Generated(Message, frozen=True):
    generations: tuple[Tokens, ...]


class Digests(Message, frozen=True):
    digests: dict[str, str]


class Served(Message, frozen=True):
    """The version that may be served, None for none, and the state of the engine's receiving end."""

    version: str | None
    state: str


class Done(Message, frozen=True):
    pass


class Failed(Message, frozen=True):
    """The command failed and changed nothing. ``kind`` is the exception's class name."""

    kind: str
    message: str


Reply = Ready | Generated | Digests | Served | Done | Failed

T = TypeVar("T")


class ConnectionClosed(ConnectionError):
    """The other side closed the connection, or its process ended."""


class Connection(Generic[T]):
    """One end: sends any message, receives only messages of ``receives``."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)

    def send(self, message: Message, deadline: float | None = None) -> None:
        """Send one message. Raises ValueError over `MAX_FRAME`, TimeoutError past ``deadline`` (monotonic seconds)."""
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME:
            raise ValueError(
                f"{type(message).__name__} takes {len(body)} bytes, the limit is {MAX_FRAME}; send less at once"
            )
        self._limit(deadline)
        try:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed("the connection closed while sending") from error

    def receive(self, deadline: float | None = None) -> T:
        """Wait for one message. Raises ConnectionClosed, TimeoutError, or msgspec.ValidationError for a foreign one."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        if length > MAX_FRAME:
            raise ConnectionError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
        return self._decoder.decode(self._exactly(length, deadline))

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            self._limit(deadline)
            try:
                count = self._socket.recv_into(view[filled:])
            except ConnectionResetError:
                count = 0
            if count == 0:
                raise ConnectionClosed("the connection closed")
            filled += count
        return data

    def _limit(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed")
        self._socket.settimeout(left)
