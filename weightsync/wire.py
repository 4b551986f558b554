"""The control connection of a weight transfer: frames, and the handshake that proves both ends know the run's token.

A frame is a 4-byte little-endian length and a msgpack body that must decode as one of the expected `messages`. The
token itself never travels: each end sends an HMAC over the other's fresh nonce, compared in constant time.

An address is a path in a folder of this user alone: of a UNIX socket, or, where participants are on several hosts that
share the folder, of a file that tells host and port. Between hosts nothing is encrypted, neither this nor the weights.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import stat
import struct
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec

from zerokl.weightsync import messages as m
from zerokl.weightsync.errors import WeightSyncError
from zerokl.weightsync.layout import Typed

_LENGTH = struct.Struct("<I")
_SEND_S = 5.0
_DIAL_S = 2.0
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
"""A host that is gone is noticed after 25 s without traffic."""
TOKEN_BYTES = 32


class Listening(Typed, frozen=True):
    """Where a coordinator listens, as the file at its address says."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]


class ConnectionLost(WeightSyncError):
    """The other end closed the connection, sent something foreign or took nothing for too long."""


class Connection:
    """One end of a control connection. One thread may send while another one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_SEND_S), 0))
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE.items():
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: m.Message) -> None:
        """Send one message. Raises ConnectionLost if nobody takes it for seconds, ValueError if it is too large."""
        body = msgspec.msgpack.encode(message)
        if len(body) > m.MAX_FRAME:
            raise ValueError(f"{type(message).__name__} takes {len(body)} bytes, the limit is {m.MAX_FRAME}")
        try:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            self.close()  # part of a frame may be out: nothing after it could be understood
            raise ConnectionLost(f"cannot send {type(message).__name__}: {error}") from error

    def receive(self, types: Any, limit: int = m.MAX_FRAME, deadline: float | None = None) -> Any:
        """The next message, of one of ``types``. Raises ConnectionLost for anything else or past ``deadline``."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        if length > limit:
            raise ConnectionLost(f"a frame of {length} bytes exceeds the limit of {limit}")
        return decode(self._exactly(length, deadline), types)

    def close(self) -> None:
        """Close; a thread that is receiving gets ConnectionLost."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end was faster
            pass
        finally:
            self._socket.close()

    def _exactly(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray()
        while len(data) < size:  # grows with what arrives: a length alone allocates nothing
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise ConnectionLost("nothing was said before the deadline")
            try:
                self._socket.settimeout(left)
                chunk = self._socket.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                continue
            except OSError as error:
                raise ConnectionLost(f"connection lost: {error}") from error
            if not chunk:
                raise ConnectionLost("the connection was closed")
            data += chunk
        return data


def decode(body: bytes | bytearray, types: Any) -> Any:
    """One message of ``types`` from its bytes. Raises ConnectionLost for anything else."""
    try:
        return msgspec.msgpack.decode(body, type=types)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConnectionLost(f"a foreign message: {error}") from error


def listen(address: Path, host: str = "") -> socket.socket:
    """A listening UNIX socket that only this user can open; one that a dead process left there is replaced.

    ``host``: listen there instead, an IP address of this machine, at a port that the system chooses.

    Raises WeightSyncError if others could reach its folder, or if somebody listens there already.
    """
    status = address.parent.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise WeightSyncError(f"{address.parent} must belong to this user alone (mode 0700)")
    with contextlib.suppress(ConnectionLost, OSError), _dial(address):
        raise WeightSyncError(f"another coordinator listens at {address}")
    if host:
        sock = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128)
        _tell(address, Listening(host, sock.getsockname()[1]))
        return sock
    address.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(address))
    address.chmod(0o600)
    sock.listen(128)
    return sock


def _tell(address: Path, where: Listening) -> None:
    """Write the file at an address, whole or not at all."""
    new = address.with_suffix(".new")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(msgspec.json.encode(where))
    new.rename(address)


def parse_listening(data: bytes) -> Listening:
    """Where a coordinator says that it listens. Raises ConnectionLost for anything but that."""
    try:
        return msgspec.json.decode(data, type=Listening)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConnectionLost(f"not where a coordinator listens: {error}") from error


def _dial(address: Path) -> socket.socket:
    """A connection to whoever listens at an address. Raises OSError or ConnectionLost if nobody does."""
    if address.is_file():
        with address.open("rb") as file:
            where = parse_listening(file.read(m.MAX_GREETING))
        sock = socket.create_connection((where.host, where.port), _DIAL_S)
        sock.settimeout(None)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(address))
    except OSError:
        sock.close()
        raise
    return sock


def new_token(path: Path) -> bytes:
    """A fresh token, also written to a new file that only this user can read."""
    token = secrets.token_bytes(TOKEN_BYTES)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(token)
    return token


def read_token(path: Path) -> bytes:
    """The run's token. Raises WeightSyncError if it cannot be read, or if the file is not this user's alone."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise WeightSyncError(f"the token file {path} must belong to this user alone (mode 0600)")
            return file.read(TOKEN_BYTES)
    except OSError as error:
        raise WeightSyncError(f"cannot read the token file {path}: {error.strerror}") from error


def connect(address: Path, timeout_s: float) -> Connection:
    """Connect to the coordinator at an address. Raises ConnectionLost if nobody listens there within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return Connection(_dial(address))
        except (OSError, ConnectionLost) as error:
            if time.monotonic() > deadline:
                raise ConnectionLost(f"no coordinator at {address}: {error}") from error
            time.sleep(0.02)


def greet(connection: Connection, token: bytes, deadline: float) -> m.Hello:
    """The coordinator's side of the handshake. Raises ConnectionLost unless the other end knows the token."""
    nonce = secrets.token_bytes(16)
    connection.send(m.Challenge(nonce))
    hello = connection.receive(m.Hello, m.MAX_GREETING, deadline)
    if not hmac.compare_digest(hello.proof, _proof(token, b"participant", nonce, hello)):
        raise ConnectionLost("the other end does not know the run's token")
    connection.send(m.Welcome(_proof(token, b"coordinator", nonce, hello)))
    return hello


def introduce(connection: Connection, token: bytes, *, source: bool, rank: int, deadline: float) -> None:
    """The participant's side of the handshake. Raises ConnectionLost unless the other end knows the token."""
    challenge = connection.receive(m.Challenge, m.MAX_GREETING, deadline)
    hello = m.Hello(source, rank, secrets.token_bytes(16), bytes(32))
    proof = _proof(token, b"participant", challenge.nonce, hello)
    connection.send(m.Hello(source, rank, hello.nonce, proof))
    welcome = connection.receive(m.Welcome, m.MAX_GREETING, deadline)
    if not hmac.compare_digest(welcome.proof, _proof(token, b"coordinator", challenge.nonce, hello)):
        raise ConnectionLost("the coordinator does not know the run's token")


def _proof(token: bytes, side: bytes, challenge: bytes, hello: m.Hello) -> bytes:
    if len(token) < TOKEN_BYTES:
        raise ValueError(f"a token has at least {TOKEN_BYTES} bytes")
    who = b"%d:%d:" % (hello.source, hello.rank)
    return hmac.digest(token, side + b"|" + who + challenge + hello.nonce, "sha256")


_KNOWN = [msgspec.json.Decoder(kind) for kind in (Listening,)]  # before threads decode them (`messages`)
