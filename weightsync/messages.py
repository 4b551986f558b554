"""Everything that crosses the control connection of a weight transfer: msgpack, checked against these types.

Orders go from the coordinator (the trainer's first rank) to the participants, answers come back. No weights and no code
travel here. Sizes are capped per field and per frame.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from zerokl.weightsync.layout import Layout, Rank, Tensor
from zerokl.weightsync.topology import Place

MAX_FRAME = 64 << 20
"""Bytes of one authenticated message: two layouts of a model with tens of thousands of tensors."""
MAX_GREETING = 4 << 10
"""Bytes of one message before authentication."""
CAUSE_LENGTH = 2000

Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
HexDigest = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
Version = Annotated[str, Meta(min_length=1, max_length=64)]
Cause = Annotated[str, Meta(max_length=CAUSE_LENGTH)]
RankNumber = Annotated[int, Meta(ge=0, lt=1 << 16)]
Endpoint = Annotated[bytes, Meta(max_length=1 << 20)]
"""What a transport tells its peers about itself: a capability, never logged."""
Seconds = Annotated[float, Meta(ge=0, le=86400)]
InFlight = Literal["abort", "retract", "continue"]
"""What becomes of requests under way when new weights come: they end with what they have; or wait, drop their cache and
go on under the new weights; or go on with the cache they have."""
Count = Annotated[int, Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag on the wire."""


class Challenge(Message, frozen=True):
    """The coordinator's first word."""

    nonce: Nonce


class Hello(Message, frozen=True):
    """Who connects, and its proof of knowing the run's token."""

    source: bool
    rank: RankNumber
    nonce: Nonce
    proof: Proof


class Welcome(Message, frozen=True):
    """The coordinator's own proof."""

    proof: Proof


class Join(Message, frozen=True):
    """What the participant holds, and where it is; sent once, after both have proven themselves."""

    tensors: tuple[Tensor, ...]
    rank: Rank
    place: Place


class InAttempt(Message, frozen=True):
    """Base of all that belongs to one attempt at a transfer; ``attempt`` is random and new each time."""

    attempt: Nonce


class Plan(InAttempt, frozen=True):
    """Compute the plan, have an end of the transport, and answer the plan's digest. Without an order for ``patience_s``
    the coordinator counts as gone."""

    version: Version
    sender: Layout
    receiver: Layout
    patience_s: Seconds
    transport: Annotated[str, Meta(max_length=64)]
    in_flight: InFlight = "abort"


class Prepare(InAttempt, frozen=True):
    """Get ready to send, or have a shadow buffer ready."""


class Transfer(InAttempt, frozen=True):
    """Move the bytes. ``endpoints``: what the transports of the peers said in `Prepared`, by name."""

    endpoints: dict[str, Endpoint]


class Verify(InAttempt, frozen=True):
    """xxh3_128 of every copy the target received, in the plan's order, as its senders computed them."""

    digests: tuple[Digest, ...]


class Commit(InAttempt, frozen=True):
    """Everyone has acknowledged: make the new version the live one, keep the old one, do not serve yet."""


class Resume(InAttempt, frozen=True):
    """The decision: let go of the old version and serve the new one."""


class Abort(InAttempt, frozen=True):
    """Stay with, or go back to, the version before this attempt."""

    cause: Cause


class Planned(InAttempt, frozen=True):
    digest: HexDigest


class Prepared(InAttempt, frozen=True):
    endpoint: Endpoint


class Transferred(InAttempt, frozen=True):
    """``digests``: of every copy a source sent, in the plan's order; empty from a target."""

    digests: tuple[Digest, ...]
    copied_bytes: Count
    seconds: Seconds


class Verified(InAttempt, frozen=True):
    """The acknowledgement: ``digest`` is xxh3_128 over the digests of what the target holds."""

    digest: Digest


class Committed(InAttempt, frozen=True):
    pass


class Resumed(InAttempt, frozen=True):
    """Served again, after ``paused_s`` from the order to stop (0 from a source, which served nothing)."""

    paused_s: Seconds = 0.0


class Aborted(InAttempt, frozen=True):
    """Back on the version before; ``quarantined``: not serving, because what it holds is not whole."""

    quarantined: bool


class Failed(InAttempt, frozen=True):
    """The order was not carried out."""

    cause: Cause


Order = Plan | Prepare | Transfer | Verify | Commit | Resume | Abort
Answer = Planned | Prepared | Transferred | Verified | Committed | Resumed | Aborted | Failed


def name_of(*, source: bool, rank: int) -> str:
    """How messages and errors call a participant: ``trainer-0``, ``rollout-3``."""
    return f"{'trainer' if source else 'rollout'}-{rank}"


def shortened(cause: object) -> str:
    """A cause that fits into a message."""
    return str(cause)[:CAUSE_LENGTH]


# msgspec 0.22 learns a type when it first decodes it, and crashes where two threads are first at once: so here, in one
_KNOWN = [msgspec.msgpack.Decoder(kind) for kind in (Order, Answer, *Message.__subclasses__()) if kind is not InAttempt]
