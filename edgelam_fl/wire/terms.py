"""The terms of one link: everything that its two ends settle before the first tensor travels.

A link gets its terms once, by `Link.open` at the end of the handshake; until then it can only shake hands. Knows neither
plans nor transports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.pace import Pace

if TYPE_CHECKING:
    from edgelam_fl.wire.link import Frame, Link

OnFrame = Callable[["Link", "Frame"], None]
OnLost = Callable[["Link", str], None]
OnSent = Callable[[pb.Header, float, float], None]
OnSuspended = Callable[["Link", str], None]
OnResumed = Callable[["Link", float, int], None]


@dataclass(frozen=True, kw_only=True)
class LinkTerms:
    """The terms of a link at one of its ends: fixed in the handshake, the same until the link ends."""

    name: str  # in events, byte counts and messages: "entry device-1"
    job_token: int  # short number of the job, in every frame; frames of another job end the link; 0: not checked
    activation_codec: str  # key of the codec for hidden states, in both directions
    gradient_codec: str  # key of the codec for their gradients, in both directions
    window: int  # micro-batches that may be in flight, as the host granted
    front_cache: bytes  # number of the place where the host keeps states of fronts; empty: it keeps none
    most_bytes: int  # size of the largest tensor that may arrive, encoded or decoded
    silent_s: float  # a stream counts as broken after so long without a message; 0: never
    reconnect_s: float  # the link counts as lost after so long without a stream; 0: with its first stream
    counters: ByteCounters
    pace: Pace | None  # how fast this end sends data, perhaps shared with other links; None: no limit
    on_frame: OnFrame  # called with every frame, on the transport's thread; a ProtocolError ends the link
    on_lost: OnLost  # called once, with the reason, unless this end closes the link first
    on_sent: (
        OnSent | None
    )  # called after a tensor has left: its header, when it was queued, when it left (monotonic, s)
    on_suspended: OnSuspended | None  # called with the reason when the link has lost its stream, but not its place
    on_resumed: OnResumed | None  # called when it has another: seconds without, bytes of the messages that leave again


# name, counters, the host's READY -> the terms of the end that dialled; raises ProtocolError if READY is of no use
MakeTerms = Callable[[str, ByteCounters, pb.Ready], LinkTerms]


def link_terms(
    name: str,
    counters: ByteCounters,
    ready: pb.Ready,
    *,
    most_bytes: int,
    on_frame: OnFrame,
    on_lost: OnLost,
    silent_s: float = 0.0,
    reconnect_s: float = 0.0,
    pace: Pace | None = None,
    on_sent: OnSent | None = None,
    on_suspended: OnSuspended | None = None,
    on_resumed: OnResumed | None = None,
) -> LinkTerms:
    """Returns the terms that READY grants, with what this end adds. Both ends make theirs here.

    Raises ProtocolError for a codec that is not known here and for a window without room for a micro-batch.
    """
    granted = ready.activation_codec, ready.gradient_codec
    if not CODECS.keys() >= set(granted) or not ready.window >= 1:
        raise ProtocolError(
            f"{name} granted the codecs {granted[0]!r} and {granted[1]!r} and window {ready.window}; known codecs: "
            f"{', '.join(CODECS)}; a window is at least 1"
        )
    return LinkTerms(
        name=name, job_token=ready.job_token, activation_codec=granted[0], gradient_codec=granted[1],
        window=ready.window, front_cache=ready.front_cache, most_bytes=most_bytes, silent_s=silent_s, reconnect_s=reconnect_s, counters=counters,
        pace=pace, on_frame=on_frame, on_lost=on_lost, on_sent=on_sent, on_suspended=on_suspended, on_resumed=on_resumed,
    )  # fmt: skip
