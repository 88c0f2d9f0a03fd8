"""A link: frames both ways between two neighbouring stages of a route, over one stream of bytes after the other.

`send` never waits for the network; received frames go to a callback, on the transport's thread. This module cuts tensors
into chunks, orders frames by urgency, puts chunks together again within the link's terms, and counts every byte. It does
not know what a frame means, nor when a stream breaks.
Neighbours: `wire.terms` says what both ends agreed on; `split.driver` and `split.host` are above; `wire.memory` and
`wire.grpc` are below, with `wire.outbox`; `wire.session` counts what has come.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from google.protobuf.message import DecodeError

from edgelam_fl.errors import PeerLost, ProtocolError
from edgelam_fl.wire import PROTOCOL_VERSION, codecs
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters, kind_name
from edgelam_fl.wire.outbox import ACTIVATIONS, CONTROL, GRADIENTS, SIGNS
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.session import Arrivals
from edgelam_fl.wire.terms import LinkTerms, OnFrame, OnLost

MAX_CHUNK_BYTES = 1 << 20  # the largest chunk that a receiver takes
MIN_CHUNK_BYTES = 16 << 10  # the smallest, but for a tensor's last chunk: a flood of crumbs costs more time than bytes
MAX_HEADER_BYTES = 4 << 20  # the TABLE of a phase with very many steps is the largest header
NOT_READING = "the other end does not read"
CLOSED = "the other end closed the link"
_UNSENT_WINDOWS = 4  # tensors in the queue, in windows: to an end that reads, at most those of a late step and the next
MOST_UNKNOWN_KINDS = 100  # that a link takes; newer versions use few
PINGS_SAVED, PINGS_PER_S = (
    200,
    20,
)  # signs of life that a link takes at once, and in the long run; honest ends send one in seconds
MAX_HELLO_BYTES = 64 << 10  # the largest header of a handshake: nobody has been let in yet
CHUNK_BYTES = (
    256 << 10
)  # our senders' choice: over 1 Mbit/s, with two links at once, pings still pass every few seconds
_PACED_CHUNK_S = 0.05  # how long a chunk of a paced link takes: more urgent frames soon get their turn
_HANDSHAKE = {pb.HELLO, pb.READY, pb.NOT_READY, pb.REFUSE}  # before a link is open, and only then
_SIGNS = {pb.PING, pb.PONG, pb.ACK}
_PRIORITY = {
    **dict.fromkeys(_HANDSHAKE | _SIGNS, SIGNS),
    pb.GRAD: GRADIENTS, pb.GRAD_END: GRADIENTS,
    pb.ACT: ACTIVATIONS, pb.LABELS: ACTIVATIONS, pb.KV_STEP: ACTIVATIONS, pb.BYE: ACTIVATIONS,
}  # fmt: skip
_ANY_TIME = {pb.ERROR}
_OPEN = {
    pb.PING, pb.PONG, pb.ACK,
    pb.TABLE, pb.TABLE_ALL, pb.ACT, pb.GRAD, pb.GRAD_END, pb.STEP_CLOSE, pb.STEP_READY, pb.STEP_APPLY, pb.DONE,
    pb.CANCEL, pb.BYE, pb.LABELS, pb.KV_STEP, pb.KV_DROP, pb.MISSING,
}  # fmt: skip
_CHATTER = {pb.PING, pb.PONG, pb.ERROR}
_WITH_TENSOR = {pb.ACT, pb.GRAD, pb.LABELS, pb.KV_STEP}
_DTYPES = {pb.LABELS: codecs.NUMBERS}  # all other kinds: codecs.HIDDEN


@dataclass
class _Partial:
    """A tensor on its way: its first chunks have arrived, in order."""

    header: pb.Header
    data: bytearray
    received_bytes: int = 0
    chunks: int = 0

    def take(self, header: pb.Header, payload: memoryview) -> bool:
        """Adds the next chunk; returns whether the tensor is complete."""
        meta, start, total = header.tensor, self.received_bytes, len(self.data)
        least = min(0 if header.last_chunk else MIN_CHUNK_BYTES, total - start)
        most = min(MAX_CHUNK_BYTES, total - start)
        if (meta.chunk, meta.offset) != (self.chunks, start) or not least <= len(payload) <= most:
            raise ProtocolError(
                f"chunk {meta.chunk} has {len(payload)} bytes at {meta.offset}; chunk {self.chunks} is next, at byte "
                f"{start} of {total}, with {least} to {most} bytes"
            )
        self.data[start : start + len(payload)] = payload
        self.received_bytes += len(payload)
        self.chunks += 1
        if header.last_chunk != (self.received_bytes == total):
            raise ProtocolError(f"the tensor of {total} bytes ended after {self.received_bytes}")
        return header.last_chunk


@dataclass(frozen=True)
class Frame:
    """One message of a link as its receiver gets it, with the whole tensor if the message has one."""

    header: pb.Header
    tensor: torch.Tensor | None = None


def _ignore(*_: object) -> None:
    """Drops its arguments: the default for callbacks."""


class Link:
    """One end of a link. Transports subclass it: `_transmit` sends messages, and they call `receive` and `lost`.

    A new link can only shake hands. `open` hands it its terms, once; from then on it carries every other kind.
    """

    def __init__(
        self, name: str, counters: ByteCounters, on_frame: OnFrame = _ignore, on_lost: OnLost = _ignore
    ) -> None:
        """`name`, `counters` and the two callbacks serve the handshake only; the terms replace all four."""
        self._name, self._counters = name, counters
        self._on_frame, self._on_lost = on_frame, on_lost
        self._terms: LinkTerms | None = None
        self.last_heard = time.monotonic()
        self.closed = False
        self._progress = pb.Progress()
        self._arrivals = Arrivals()
        self._send_lock = threading.RLock()
        self._lost_lock = threading.Lock()
        self._partial: dict[int, _Partial] = {}
        self._unknown_kinds = 0
        self._unsent = 0  # tensors in the queue
        self._pings_left, self._pings_counted_at = float(PINGS_SAVED), self.last_heard
        self._unsent_signs: set[int] = set()  # kinds of signs, of which one is in the queue

    # ---- for the layers above

    @property
    def name(self) -> str:
        return self._terms.name if self._terms is not None else self._name

    @property
    def counters(self) -> ByteCounters:
        return self._terms.counters if self._terms is not None else self._counters

    @property
    def terms(self) -> LinkTerms:
        """Returns what both ends agreed on. RuntimeError before the handshake is over: a mistake of the caller."""
        if self._terms is None:
            raise RuntimeError(f"link {self._name} has no terms yet: it is still shaking hands")
        return self._terms

    @property
    def is_open(self) -> bool:
        return self._terms is not None

    @property
    def pending_bytes(self) -> int:
        """Counts the memory held for tensors of which chunks are still to come."""
        return sum(len(partial_.data) for partial_ in self._partial.values())

    def open(self, terms: LinkTerms) -> None:
        """Ends the handshake: from now on `terms` hold. Raises PeerLost if the link has ended meanwhile."""
        with self._lost_lock:
            if self._terms is not None:
                raise RuntimeError(f"link {self.name} has its terms already")
            if self.closed:
                raise PeerLost(f"{terms.name} was lost during the handshake")
            self._on_frame, self._on_lost = terms.on_frame, terms.on_lost
            self._terms = terms

    def continue_on(self, newcomer: Link) -> pb.Ready | None:
        """Goes on with the stream of a link that shakes hands, if it is this link's dialler who came again.

        Returns READY for the newcomer; None: it is somebody else's, or this link cannot go on.
        """
        return None

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """Lets other threads' frames wait until the block ends, so that the handshake's own frames come first."""
        with self._send_lock:
            yield

    def note_progress(self, phase: pb.Phase, step: int) -> None:
        """Notes how far the work is; pings and pongs carry it to the other end."""
        self._progress.phase, self._progress.step = phase, step

    def ping(self) -> None:
        """Asks the other end for a sign of life, and gives one."""
        self._send_sign(pb.PING)

    def _send_sign(self, kind: pb.Kind) -> None:
        """Sends a sign, unless one of its kind is in the queue: to an end that does not read, nothing more is said."""
        with self._send_lock:
            if kind in self._unsent_signs or self.closed:
                return
            self._unsent_signs.add(kind)
            header = pb.Header(kind=kind, progress=self._progress, job_token=self.terms.job_token)
            self._enqueue(header, [b""], partial(self._unsent_signs.discard, kind))

    def send(self, header: pb.Header, tensor: torch.Tensor | None = None) -> None:
        """Queues a frame. A closed link drops it: `on_lost` has already been called with the reason.

        The tensor is read, and the header filled in, until they have left: neither may change meanwhile.
        """
        if header.kind in _OPEN or self.is_open:
            header.job_token = self.terms.job_token
        if tensor is not None:
            self._send_tensor(header, tensor)
            return
        with self._send_lock:  # sequence numbers must leave in the order of a queue
            if not self.closed:
                self._enqueue(header, [b""])

    def _send_tensor(self, header: pb.Header, tensor: torch.Tensor) -> None:
        codec = self._codec_of(header.kind)
        header.tensor.CopyFrom(codecs.describe(tensor, codec, _DTYPES.get(header.kind, codecs.HIDDEN)))
        left = partial(self._has_left, header, time.monotonic())
        with self._send_lock:
            if self.closed:
                return
            self._unsent += 1
            self._transmit_later(_PRIORITY[header.kind], partial(self._encoded, header, tensor), left)
        if self._unsent > _UNSENT_WINDOWS * self.terms.window:
            self.lost(NOT_READING)

    def _has_left(self, header: pb.Header, queued: float) -> None:
        """Counts a tensor as sent. `queued`: when it was put into the queue; monotonic, s."""
        with self._send_lock:
            self._unsent -= 1
        if self.terms.on_sent is not None:
            self.terms.on_sent(header, queued, time.monotonic())

    def _encoded(self, header: pb.Header, tensor: torch.Tensor) -> list[bytes]:
        """Returns the messages of a tensor that `header` describes, at least one. A tensor that cannot be encoded ends the link."""
        try:
            data = memoryview(codecs.CODECS[header.tensor.codec].encode(tensor))
        except Exception as error:  # noqa: BLE001 - on a sender's thread nobody else hears of it, and the other end would wait
            self.lost(f"a tensor could not be encoded: {type(error).__name__}: {error}")
            return []
        header.tensor.total_bytes = len(data)
        size = _chunk_bytes(self.terms.pace)
        return self._messages(header, [data[start : start + size] for start in range(0, max(1, len(data)), size)])

    def _codec_of(self, kind: int) -> str:
        """Returns the key of the codec for the tensors of a kind of frames."""
        if kind in _DTYPES:
            return codecs.LOSSLESS
        return self.terms.gradient_codec if kind == pb.GRAD else self.terms.activation_codec

    def close(self) -> None:
        """Ends the link from this side; queued frames are still sent."""
        with self._lost_lock:
            self.closed = True
        self._shut(lost=False)

    def _enqueue(
        self, header: pb.Header, payloads: Sequence[bytes | memoryview], left: Callable[[], None] | None = None
    ) -> None:
        self._transmit(_PRIORITY.get(header.kind, CONTROL), self._messages(header, payloads), left)

    def _messages(self, header: pb.Header, payloads: Sequence[bytes | memoryview]) -> list[bytes]:
        """Returns a message for each part of a frame's payload."""
        messages, offset = [], 0
        for number, payload in enumerate(payloads):
            header.last_chunk = number == len(payloads) - 1
            if header.HasField("tensor"):
                header.tensor.chunk, header.tensor.offset = number, offset
            messages.append(self._message(header, payload))
            offset += len(payload)
        return messages

    # ---- for transports

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        """Sends the messages in order, each when its turn comes, and then calls `left`."""
        raise NotImplementedError("a transport sends messages")

    def _transmit_later(self, priority: int, make: Callable[[], list[bytes]], left: Callable[[], None] | None) -> None:
        """Sends the messages that `make` returns. A transport with a sender's thread calls it there, when their turn comes."""
        self._transmit(priority, make(), left)

    def _shut(self, lost: bool) -> None:
        """Ends the transport. `lost`: queued tensors are dropped, because nobody waits for them."""

    def _acknowledge(self) -> None:
        """Tells the other end how many messages have come, if it keeps what it sends until it hears that."""

    def _take_ack(self, received: int) -> bool:
        """Notes how many messages of this link the other end has; returns whether that is news.

        Raises ProtocolError for more than have left.
        """
        return False

    def receive(self, message: bytes) -> None:
        """Takes one message from the other end. A message that breaks the protocol ends the link; both ends get the reason.

        Of what comes after the end of the link, acknowledgements still count.
        """
        if self.closed:
            with suppress(ProtocolError):
                self._take_ack(_split(message, MAX_HEADER_BYTES)[0].ack)
            return
        self.last_heard = time.monotonic()
        try:
            frame = self._parse(message)
            if frame is not None:
                self._deliver(frame)
        except ProtocolError as error:
            farewell = pb.Header(kind=pb.ERROR, error=pb.Error(code="protocol", scope="route", text=str(error)))
            self.lost(f"the other end broke the protocol: {error}", farewell)

    def _deliver(self, frame: Frame) -> None:
        """Answers signs of life; hands any other frame on. Raises ProtocolError if the other end sends too many."""
        header = frame.header
        if header.kind in _CHATTER:
            self._count_chatter()
        if header.kind == pb.PING:
            self._send_sign(pb.PONG)
        elif header.kind == pb.ERROR and header.error.scope != "unit":
            self.lost(f"the other end reports {header.error.code}: {header.error.text}")
        elif header.kind == pb.BYE:
            self.lost(CLOSED)
        elif header.kind not in _SIGNS:
            self._on_frame(self, frame)

    def _count_chatter(self) -> None:
        gained = PINGS_PER_S * (self.last_heard - self._pings_counted_at)
        self._pings_left = min(PINGS_SAVED, self._pings_left + gained) - 1
        self._pings_counted_at = self.last_heard
        if self._pings_left < 0:
            raise ProtocolError(f"a flood of PING, PONG or ERROR: more than {PINGS_PER_S} per second")

    def lost(self, reason: str, farewell: pb.Header | None = None) -> None:
        """Ends the link for `reason`, after a last frame to the other end, the `farewell`, if there is one."""
        with self._lost_lock:
            if self.closed:
                return
            self.closed = True
        if farewell is not None:
            with self._send_lock:
                self._enqueue(farewell, [b""])
        self._shut(lost=True)
        self._on_lost(self, reason)

    # ---- framing

    def _message(self, header: pb.Header, payload: bytes | memoryview) -> bytes:
        header.ack, header.send_ns = self._arrivals.tell(), time.monotonic_ns()
        encoded = header.SerializeToString()
        message = b"".join((struct.pack("<I", len(encoded)), encoded, payload))
        self.counters.add(self.name, "sent", header.kind, len(payload), len(message))
        return message

    def _parse(self, message: bytes) -> Frame | None:
        """Returns the frame that the message completes. None: its tensor is not complete, or its kind is unknown."""
        header, payload = _split(message, MAX_HEADER_BYTES if self.is_open else MAX_HELLO_BYTES)
        self.counters.add(self.name, "received", header.kind, len(payload), len(message))
        news = self._take_ack(header.ack)
        if header.kind == pb.ACK and not news:
            self._count_chatter()
        if _PRIORITY.get(header.kind) != SIGNS and self._arrivals.add(len(message)) and self.is_open:
            self._acknowledge()
        expected = self._terms.job_token if self._terms is not None else 0
        if expected and header.job_token not in (0, expected):
            raise ProtocolError(f"a frame of job {header.job_token} on a link of job {expected}")
        if not self._understands(header):
            return None
        if header.HasField("tensor"):
            return self._assemble(header, payload)
        if payload:
            raise ProtocolError(f"{len(payload)} bytes without a tensor in a frame of kind {header.kind}")
        return Frame(header)

    def _understands(self, header: pb.Header) -> bool:
        """Answers an unknown kind, unless it is optional. Raises ProtocolError for a kind at the wrong time."""
        if header.kind in _ANY_TIME or header.kind in (_OPEN if self.is_open else _HANDSHAKE):
            return True
        if header.kind in _HANDSHAKE or not self.is_open:
            when = "after the handshake" if self.is_open else "before the handshake is over"
            raise ProtocolError(f"a frame of kind {kind_name(header.kind)} {when}")
        self._unknown_kinds += 1
        if self._unknown_kinds > MOST_UNKNOWN_KINDS:
            raise ProtocolError(f"more than {MOST_UNKNOWN_KINDS} frames of unknown kinds")
        if not header.optional:
            text = f"kind {header.kind} is not supported in version {PROTOCOL_VERSION}"
            self.send(pb.Header(kind=pb.ERROR, error=pb.Error(code="unsupported", scope="unit", text=text)))
        return False

    def _assemble(self, header: pb.Header, payload: memoryview) -> Frame | None:
        """Takes a chunk; returns the frame with the tensor if the chunk was the last. The sender chooses the sizes."""
        if header.kind not in _WITH_TENSOR:
            raise ProtocolError(f"a tensor in a frame of kind {header.kind}")
        priority, meta = _PRIORITY[header.kind], header.tensor
        if meta.chunk == 0:
            if priority in self._partial:
                raise ProtocolError("a tensor began before the one before it was complete")
            codecs.check(meta, self.terms.most_bytes, _DTYPES.get(header.kind, codecs.HIDDEN))
            agreed = self._codec_of(header.kind)
            if meta.codec not in (agreed, codecs.LOSSLESS):
                raise ProtocolError(f"codec {meta.codec!r} on a link that agreed on {agreed!r}")
            self._partial[priority] = _Partial(header, bytearray(meta.total_bytes))
        open_tensor = self._partial.get(priority)
        if open_tensor is None:
            raise ProtocolError("a tensor's later chunk came before its first")
        if not _same_tensor(open_tensor.header, header):
            raise ProtocolError(f"chunk {meta.chunk} does not belong to the tensor that is open")
        if not open_tensor.take(header, payload):
            return None
        del self._partial[priority]
        return Frame(header, codecs.CODECS[meta.codec].decode(open_tensor.data, open_tensor.header.tensor))


def _chunk_bytes(pace: Pace | None) -> int:
    if pace is None:
        return CHUNK_BYTES
    return int(max(MIN_CHUNK_BYTES, min(CHUNK_BYTES, pace.bytes_per_s * _PACED_CHUNK_S)))


def _split(message: bytes, most_bytes: int) -> tuple[pb.Header, memoryview]:
    """Returns the header, of at most `most_bytes`, and the payload. Raises ProtocolError for bytes that are not a message."""
    if len(message) < 4:
        raise ProtocolError(f"a message of {len(message)} bytes is shorter than its own length field")
    (length,) = struct.unpack_from("<I", message)
    if length > min(most_bytes, len(message) - 4):
        raise ProtocolError(f"a header of {length} bytes in a message of {len(message)}")
    view = memoryview(message)
    try:
        return pb.Header.FromString(view[4 : 4 + length].tobytes()), view[4 + length :]
    except DecodeError as error:
        raise ProtocolError(f"a header that cannot be read: {error}") from error


def kind_and_payload(message: bytes) -> tuple[int, int]:
    """Returns the kind of a message that was made here, and the size of its payload in bytes."""
    header, payload = _split(message, MAX_HEADER_BYTES)
    return header.kind, len(payload)


def _same_tensor(first: pb.Header, other: pb.Header) -> bool:
    unit = ("kind", "phase", "step", "micro_batch", "device_index", "kv_step")
    described = ("dtype", "shape", "codec", "total_bytes")
    return all(getattr(first, field) == getattr(other, field) for field in unit) and all(
        getattr(first.tensor, field) == getattr(other.tensor, field) for field in described
    )
