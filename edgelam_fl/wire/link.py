"""A link: one bidirectional stream of frames between two neighbouring stages of a route.

`send` never waits for the network; received frames go to a callback, on the transport's thread. This module cuts tensors
into chunks, says how urgent each is, puts chunks together again under the link's limits, and counts every byte. It does
not know what a frame means.
Neighbours: `split.driver` and `split.host` above; `wire.memory` and `wire.grpc` below, with `wire.outbox`.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from google.protobuf.message import DecodeError

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import raw as codecs
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.outbox import ACTIVATIONS, CONTROL, GRADIENTS
from edgelam_fl.wire.pace import Pace

MAX_CHUNK_BYTES = 1 << 20  # that a sender may choose
MIN_CHUNK_BYTES = 16 << 10  # of all chunks but a tensor's last: a flood of crumbs costs more time than it has bytes
MAX_HEADER_BYTES = 4 << 20  # a TABLE of very many steps is the largest
CHUNK_BYTES = 256 << 10  # that we choose: over 1 Mbit/s, on two links at once, pings still come every few seconds
_PACED_CHUNK_S = 0.05  # of a paced link, so that what is more urgent soon gets its turn
_PRIORITY = {
    pb.GRAD: GRADIENTS, pb.GRAD_END: GRADIENTS,
    pb.ACT: ACTIVATIONS, pb.LABELS: ACTIVATIONS, pb.KV_STEP: ACTIVATIONS,
}  # fmt: skip
_UNDERSTOOD = {
    pb.HELLO, pb.READY, pb.NOT_READY, pb.REFUSE, pb.TABLE, pb.TABLE_ALL, pb.ACT, pb.GRAD, pb.GRAD_END,
    pb.STEP_CLOSE, pb.STEP_READY, pb.STEP_APPLY, pb.DONE, pb.CANCEL, pb.PING, pb.PONG, pb.ERROR,
    pb.LABELS, pb.KV_STEP, pb.KV_DROP,
}  # fmt: skip
_WITH_TENSOR = {pb.ACT, pb.GRAD, pb.LABELS, pb.KV_STEP}
_DTYPES = {pb.LABELS: codecs.NUMBERS}  # all else: codecs.HIDDEN
_LOSSLESS = "raw"  # numbers are never rounded, whatever the link's codec


# What a link tells those above: frames, and once that it is lost and why.
Ears = tuple[Callable[["Link", "Frame"], None], Callable[["Link", str], None]]


@dataclass
class _Partial:
    """A tensor of which some chunks have arrived, in order."""

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
    header: pb.Header
    tensor: torch.Tensor | None = None


class Link:
    """One end of a link. Transports subclass it: `_transmit` sends messages, and they call `receive` and `lost`."""

    def __init__(self, name: str, counters: ByteCounters, *, max_tensor_bytes: int = 0, codec: str = "raw") -> None:
        self.name = name
        self.counters = counters
        self.max_tensor_bytes = max_tensor_bytes
        self.codec = codec
        self.silent_s = 0.0  # without a word for longer, the link is given up; 0: never (in memory)
        self.job_token = 0
        self.progress = pb.Progress()  # what our PONGs tell
        # These two are set before data flows. Links may share a pace; without a network (in memory) it limits nothing.
        self.pace: Pace | None = None
        # Called when a tensor has left, with its header, when it was queued and when it left (time.monotonic()).
        self.on_sent: Callable[[pb.Header, float, float], None] | None = None
        self.last_heard = time.monotonic()
        self.closed = False
        self._on_frame: Callable[[Link, Frame], None] = lambda link, frame: None
        self._on_lost: Callable[[Link, str], None] = lambda link, reason: None
        self._sent_seq = 0
        self._send_lock = threading.RLock()
        self._lost_lock = threading.Lock()
        self._partial: dict[int, _Partial] = {}

    # ---- for those above

    def attach(self, on_frame: Callable[[Link, Frame], None], on_lost: Callable[[Link, str], None]) -> None:
        """`on_lost` is called once, with the reason, unless this end closes first."""
        self._on_frame, self._on_lost = on_frame, on_lost

    def send(self, header: pb.Header, tensor: torch.Tensor | None = None) -> None:
        """Queues a frame. On a closed link the frame is dropped: whoever cares was told by `on_lost`."""
        header.job_token = self.job_token
        payloads: list[bytes | memoryview] = [b""]
        left = None
        if tensor is not None:
            codec = _LOSSLESS if header.kind in _DTYPES else self.codec
            header.tensor.CopyFrom(codecs.describe(tensor, codec, _DTYPES.get(header.kind, codecs.HIDDEN)))
            data = memoryview(codecs.CODECS[codec].encode(tensor))
            header.tensor.total_bytes = len(data)
            size = self._chunk_bytes()
            payloads = [data[start : start + size] for start in range(0, max(1, len(data)), size)]
            if self.on_sent is not None:
                left = partial(_tell, self.on_sent, header, time.monotonic())
        with self._send_lock:  # sequence numbers must leave in the order of a queue
            if not self.closed:
                self._enqueue(header, payloads, left)

    def close(self) -> None:
        """Ends the link from this side; queued frames are still sent."""
        with self._lost_lock:
            self.closed = True
        self._shut(lost=False)

    def _chunk_bytes(self) -> int:
        if self.pace is None:
            return CHUNK_BYTES
        return int(max(MIN_CHUNK_BYTES, min(CHUNK_BYTES, self.pace.bytes_per_s * _PACED_CHUNK_S)))

    def _enqueue(
        self, header: pb.Header, payloads: Sequence[bytes | memoryview], left: Callable[[], None] | None = None
    ) -> None:
        messages, offset = [], 0
        for number, payload in enumerate(payloads):
            header.last_chunk = number == len(payloads) - 1
            if header.HasField("tensor"):
                header.tensor.chunk, header.tensor.offset = number, offset
            messages.append(self._message(header, payload))
            offset += len(payload)
        self._transmit(_PRIORITY.get(header.kind, CONTROL), messages, left)

    # ---- for transports

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        """Sends them in order, each when its turn comes, and then calls `left`."""
        raise NotImplementedError("a transport sends messages")

    def _shut(self, lost: bool) -> None:
        """Lets the transport go. `lost`: nobody waits for the data that has not left."""

    def receive(self, message: bytes) -> None:
        """One message from the other end. What breaks the protocol ends the link, with the reason told to both ends."""
        if self.closed:
            return
        self.last_heard = time.monotonic()
        try:
            frame = self._parse(message)
        except ProtocolError as error:
            farewell = pb.Header(kind=pb.ERROR, error=pb.Error(code="protocol", scope="route", text=str(error)))
            self.lost(f"the other end broke the protocol: {error}", farewell)
            return
        if frame is None:
            return
        if frame.header.kind == pb.PING:
            self.send(pb.Header(kind=pb.PONG, progress=self.progress))
        elif frame.header.kind == pb.ERROR and frame.header.error.scope != "unit":
            self.lost(f"the other end reports {frame.header.error.code}: {frame.header.error.text}")
        elif frame.header.kind != pb.PONG:
            self._on_frame(self, frame)

    def lost(self, reason: str, farewell: pb.Header | None = None) -> None:
        """Ends the link for `reason`; the other end may be told a `farewell` first."""
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
        self._sent_seq += 1
        header.seq, header.send_ns = self._sent_seq, time.monotonic_ns()
        encoded = header.SerializeToString()
        message = b"".join((struct.pack("<I", len(encoded)), encoded, payload))
        self.counters.add(self.name, "sent", header.kind, len(payload), len(message))
        return message

    def _parse(self, message: bytes) -> Frame | None:
        header, payload = _split(message)
        self.counters.add(self.name, "received", header.kind, len(payload), len(message))
        if self.job_token and header.job_token not in (0, self.job_token):
            raise ProtocolError(f"a frame of job {header.job_token} on a link of job {self.job_token}")
        if header.kind not in _UNDERSTOOD:
            if not header.optional:
                text = f"kind {header.kind} is not supported in version 1"
                self.send(pb.Header(kind=pb.ERROR, error=pb.Error(code="unsupported", scope="unit", text=text)))
            return None
        if header.HasField("tensor"):
            return self._assemble(header, payload)
        if payload:
            raise ProtocolError(f"{len(payload)} bytes without a tensor in a frame of kind {header.kind}")
        return Frame(header)

    def _assemble(self, header: pb.Header, payload: memoryview) -> Frame | None:
        """Takes a chunk; the frame with the tensor when it was the last one. The sender chooses the chunks' sizes."""
        if header.kind not in _WITH_TENSOR:
            raise ProtocolError(f"a tensor in a frame of kind {header.kind}")
        priority, meta = _PRIORITY[header.kind], header.tensor
        if meta.chunk == 0:
            if priority in self._partial:
                raise ProtocolError("a tensor began before the one before it was complete")
            codecs.check(meta, self.max_tensor_bytes, _DTYPES.get(header.kind, codecs.HIDDEN))
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


def _tell(on_sent: Callable[[pb.Header, float, float], None], header: pb.Header, queued: float) -> None:
    on_sent(header, queued, time.monotonic())


def _split(message: bytes) -> tuple[pb.Header, memoryview]:
    if len(message) < 4:
        raise ProtocolError(f"a message of {len(message)} bytes is shorter than its own length field")
    (length,) = struct.unpack_from("<I", message)
    if length > min(MAX_HEADER_BYTES, len(message) - 4):
        raise ProtocolError(f"a header of {length} bytes in a message of {len(message)}")
    view = memoryview(message)
    try:
        return pb.Header.FromString(view[4 : 4 + length].tobytes()), view[4 + length :]
    except DecodeError as error:
        raise ProtocolError(f"a header that is no header: {error}") from error


def _same_tensor(first: pb.Header, other: pb.Header) -> bool:
    unit = ("kind", "phase", "step", "micro_batch", "try", "device_index")
    described = ("dtype", "shape", "codec", "codec_meta", "total_bytes")
    return all(getattr(first, field) == getattr(other, field) for field in unit) and all(
        getattr(first.tensor, field) == getattr(other.tensor, field) for field in described
    )
