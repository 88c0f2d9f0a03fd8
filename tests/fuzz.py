"""Mutated frames, handshakes and calls to the hub, from a seed: into links of this process, and at live ports."""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from edgelam_fl.split.inbox import Inbox
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.link import Link
from tests.links import ready, terms

_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
_NUMBERS = [0, 1, 2**32 - 1]
_BODIES = (
    "hello", "ready", "not_ready", "refuse", "table", "table_all", "step_close", "step_ready", "step_apply", "done",
    "cancel", "error", "progress", "kv_step", "kv_drop",
)  # fmt: skip
_CALLS = {
    "Slices": ("Describe", "List", "Fetch"),
    "Echo": ("Ping", "Take", "Give"),
    "Relay": ("Listen", "Dial", "Accept"),
    "Attendance": ("Attend",),
}
STREAM_S = 60.0  # what a stream or a call may take before it counts as hung


@dataclass
class Tally:
    """What became of the mutated input."""

    outcomes: Counter[str] = field(default_factory=Counter)
    escaped: list[tuple[str, bytes]] = field(
        default_factory=list
    )  # exceptions that nobody caught, and what caused them
    slowest_s: float = 0.0

    @property
    def hung(self) -> int:
        return self.outcomes["DEADLINE_EXCEEDED"]


# ---------------------------------------------------------------- what is sent


def frame(rng: random.Random) -> bytes:
    """Returns a message that is a frame, nearly a frame, or noise."""
    header = pb.Header(
        last_chunk=rng.random() < 0.7, job_token=rng.choice([0, 0, 7, 2**32 - 1]),
        step=rng.choice(_NUMBERS), micro_batch=rng.choice(_NUMBERS), device_index=rng.choice(_NUMBERS),
        row_lengths=[rng.randrange(2**32)] * rng.randrange(3), loss_sum=rng.choice([0.0, float("nan"), float("inf")]),
        positions=[rng.randrange(2**32)] * rng.randrange(3),
        optional=rng.random() < 0.1,
    )  # fmt: skip
    header.phase = rng.choice([*pb.Phase.values(), 7])
    header.kind = rng.choice([*pb.Kind.values(), 99, 2**31 - 1, -1])
    body = rng.choice(["", *_BODIES])
    if body:
        getattr(header, body).SetInParent()
    if body == "hello":
        header.hello.CopyFrom(_hello(rng))
    if body == "error":
        header.error.scope = rng.choice(["unit", "route", ""])
    if body in ("table", "table_all"):
        getattr(header, body).steps.add(labels=rng.choice(_NUMBERS))
    payload = b""
    if rng.random() < 0.6:
        header.tensor.CopyFrom(_tensor(rng))
        payload = rng.randbytes(rng.choice([0, 96, 96, 160, 1000]))
    encoded = header.SerializeToString()
    return _mutated(rng, struct.pack("<I", len(encoded)) + encoded + payload)


def handshake(rng: random.Random) -> bytes:
    """Returns a HELLO that is nearly right."""
    encoded = pb.Header(kind=pb.HELLO, hello=_hello(rng)).SerializeToString()
    return _mutated(rng, struct.pack("<I", len(encoded)) + encoded)


def _hello(rng: random.Random) -> pb.Hello:
    return pb.Hello(
        version=rng.choice([0, PROTOCOL_VERSION, PROTOCOL_VERSION, PROTOCOL_VERSION + 1]),
        job=rng.choice(["", "x/1/1", "\x00/../..", "a" * 5000]), node=rng.choice(["ann", "", "<img>", "../x"]),
        device_index=rng.choice(_NUMBERS), link=rng.choice(pb.LinkRole.values()), route_token=rng.randbytes(rng.randrange(40)),
        window=rng.choice(_NUMBERS), codecs=rng.choice([[], ["raw"], ["x" * 1000] * 20]),
    )  # fmt: skip


def _tensor(rng: random.Random) -> pb.Tensor:
    shapes: list[list[int]] = [
        [2, 3, 4],
        [2, 3, 4],
        [1, 5, 8],
        [0, 3, 4],
        [1 << 24, 1 << 24, 4],
        [2**32 - 1],
        [],
        [1] * 9,
    ]
    shape = rng.choice(shapes)
    size = 4
    for side in shape:
        size *= side
    total = rng.choice([size, size, size, 4 << 30, 2**64 - 1, 0, size + 1])
    return pb.Tensor(
        dtype=rng.choice(["float32", "float32", "float16", "object", "int64", ""]), shape=shape,
        codec=rng.choice(["raw", "raw", "zip", ""]), total_bytes=min(total, 2**64 - 1),
        chunk=rng.choice([0, 0, 0, 1, 2**32 - 1]), offset=rng.choice([0, 0, 1, 2**63]),
    )  # fmt: skip


def _mutated(rng: random.Random, raw: bytes) -> bytes:
    """Returns the message as it is, cut, with another length, with other bytes, or noise instead."""
    how = rng.randrange(8)
    if how == 0:
        return raw[: rng.randrange(len(raw))]
    if how == 1:
        return struct.pack("<I", rng.choice([2**32 - 1, 0, len(raw), 5 << 20])) + raw[4:]
    if how == 2:
        changed = bytearray(raw)
        for _ in range(rng.randrange(1, 8)):
            changed[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(changed)
    return rng.randbytes(rng.randrange(200)) if how == 3 else raw


# ---------------------------------------------------------------- where it is sent


def fuzz_links(count: int, seed: int) -> Tally:
    """Feeds messages to links of this process, half of them open and half of them shaking hands."""
    rng, tally, link = random.Random(seed), Tally(), None
    inbox = Inbox(3600.0)
    for _ in range(count):
        if link is None or link.closed:
            link = _Mute("entry ann", ByteCounters(), lambda _, __: tally.outcomes.update(["handshake frame"]))
            if rng.random() < 0.5:
                link.open(terms(answer=ready(), most_bytes=1 << 20, on_frame=inbox.on_frame))
        raw = frame(rng) if link.is_open or rng.random() < 0.5 else handshake(rng)
        began = time.perf_counter()
        try:
            link.receive(raw)
        except Exception as error:  # noqa: BLE001 - what is looked for
            tally.escaped.append((f"{type(error).__name__}: {error}", raw))
            link = None
        tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)
        tally.outcomes["closed" if link is None or link.closed else "taken"] += 1
        while not inbox.empty():
            inbox.get(0.0)
    return tally


class _Mute(Link):
    """A link that sends nothing."""

    def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
        if left is not None:
            left()


def fuzz_port(address: str, frames: int, seed: int, under_way: Callable[[], bool] = lambda: True) -> Tally:
    """Sends frames to a data port, a few on each stream; stops early if `under_way` returns False."""
    rng, tally, sent = random.Random(seed), Tally(), 0
    while sent < frames and under_way():
        messages = [
            handshake(rng) if rng.random() < 0.5 else frame(rng),
            *(frame(rng) for _ in range(rng.randrange(12))),
        ]
        sent += len(messages)
        with grpc.insecure_channel(address, options=_OWN_CONNECTION) as channel:
            _note(tally, stub(channel, "DataPlane", "Link")(iter(messages), timeout=STREAM_S))
    tally.outcomes["frames"] = sent
    return tally


def fuzz_hub(address: str, calls: int, seed: int, under_way: Callable[[], bool] = lambda: True) -> Tally:
    """Calls the hub's methods with mutated requests and tokens; stops early if `under_way` returns False."""
    rng, tally, made = random.Random(seed), Tally(), 0
    with grpc.insecure_channel(address, options=_OWN_CONNECTION) as channel:
        while made < calls and under_way():
            made += 1
            service = rng.choice(list(_CALLS))
            method = rng.choice(_CALLS[service])
            request = pb.SliceRequest(
                model_digest=rng.choice(["", "0" * 64, "../../etc/passwd", "\x00", "a" * 70]), base=rng.choice(["fp32", "../x", ""]),
                parts=[pb.SlicePart(name=rng.choice(["../../etc/passwd", "config.json", "x" * 3000]), offset=rng.choice([0, 2**63]))],
            )  # fmt: skip
            raw = request.SerializeToString() if rng.random() < 0.6 else rng.randbytes(rng.randrange(60))
            metadata = rng.choice([
                (), (("part-bin", rng.randbytes(9)), ("token-bin", rng.randbytes(32))), (("number-bin", rng.randbytes(16)),),
            ])  # fmt: skip
            path = f"/edgelam.v1.{service}/{method}"
            _note(tally, channel.stream_stream(path)(iter([raw]), timeout=STREAM_S, metadata=metadata))
    tally.outcomes["calls"] = made
    return tally


def _note(tally: Tally, answers: Iterator[bytes]) -> None:
    """Reads all answers of a call and notes how it ended."""
    began = time.perf_counter()
    try:
        for _ in answers:
            pass
        tally.outcomes["ended"] += 1
    except grpc.RpcError as error:
        tally.outcomes[error.code().name] += 1
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - began)


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096
