"""Links: chunks, order, byte counts, and what a hostile or newer peer may send."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelam_fl.errors import PeerLost, ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.codecs.raw import RawCodec
from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES, ByteCounters
from edgelam_fl.wire.link import (
    CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_HEADER_BYTES,
    MIN_CHUNK_BYTES,
    Frame,
    Link,
)
from edgelam_fl.wire.memory import MemoryLink, memory_pair
from edgelam_fl.wire.outbox import ACTIVATIONS, CONTROL, GRADIENTS, Outbox
from tests.links import open_pair, ready, terms

LIMIT = 3 << 20
UNKNOWN = sorted((set(range(64)) - set(pb.Kind.values())) | {pb.KIND_UNSPECIFIED, 99})


class End:
    """One end of a memory pair, with what it heard."""

    def __init__(self, link: MemoryLink, job_token: int) -> None:
        self.link, self.frames, self.reasons = link, list[Frame](), list[str]()
        link.open(
            terms(
                answer=ready(job_token), most_bytes=LIMIT,
                on_frame=lambda _, frame: self.frames.append(frame),
                on_lost=lambda _, reason: self.reasons.append(reason),
            )
        )  # fmt: skip


def pair(job_token: int = 0) -> tuple[End, End]:
    left, right = memory_pair("entry x", ByteCounters(), ByteCounters())
    return End(left, job_token), End(right, job_token)


def message(header: pb.Header, payload: bytes = b"") -> bytes:
    encoded = header.SerializeToString()
    return struct.pack("<I", len(encoded)) + encoded + payload


def chunk(
    number: int = 0,
    payload: int | None = None,
    *,
    last: bool = False,
    shape: tuple[int, ...] = (1, 1, 655_360),  # 2.5 MiB in fp32
    kind: pb.Kind = pb.ACT,
    **meta: Any,
) -> bytes:
    """A chunk of an ACT as long as allowed, unless `kind` and `meta` say otherwise."""
    total = 4 * shape[0] * shape[1] * shape[2]
    fields = {
        "dtype": "float32",
        "shape": shape,
        "codec": "raw",
        "total_bytes": total,
        "chunk": number,
        "offset": number * MAX_CHUNK_BYTES,
    }
    header = pb.Header(kind=kind, phase=pb.TRAIN, last_chunk=last, tensor=pb.Tensor(**{**fields, **meta}))
    return message(
        header, bytes(min(MAX_CHUNK_BYTES, total - number * MAX_CHUNK_BYTES) if payload is None else payload)
    )


# ---------------------------------------------------------------- the handshake and its terms


@pytest.mark.parametrize("kind", [pb.ACT, pb.TABLE, pb.STEP_CLOSE, pb.DONE, pb.CANCEL, pb.KV_STEP])
def test_before_its_terms_a_link_can_only_shake_hands(kind: pb.Kind) -> None:
    left, right = memory_pair("entry x", ByteCounters(), ByteCounters())
    with pytest.raises(RuntimeError, match="entry x has no terms yet"):
        left.send(pb.Header(kind=kind))
    right.receive(chunk(kind=kind) if kind in (pb.ACT, pb.KV_STEP) else message(pb.Header(kind=kind)))
    assert right.closed
    assert right.pending_bytes == 0


def test_a_handshake_passes_and_the_name_of_a_link_is_that_of_its_terms() -> None:
    heard: list[int] = []
    left, right = memory_pair("from 10.0.0.7", ByteCounters(), ByteCounters())
    left.send(pb.Header(kind=pb.HELLO))
    right.open(terms("entry device-1", on_frame=lambda _, frame: heard.append(frame.header.kind)))
    assert (right.name, right.terms.name) == ("entry device-1", "entry device-1")
    right.send(pb.Header(kind=pb.READY))
    left.open(terms("entry edge-1"))
    left.send(pb.Header(kind=pb.DONE))
    assert heard == [pb.DONE]
    assert not left.closed


@pytest.mark.parametrize("kind", [pb.HELLO, pb.READY, pb.NOT_READY, pb.REFUSE])
def test_a_second_handshake_ends_the_link(kind: pb.Kind) -> None:
    left, right = pair()
    right.link.receive(message(pb.Header(kind=kind)))
    assert f"a frame of kind {pb.Kind.Name(kind)} after the handshake" in left.reasons[0]


def test_terms_are_handed_over_once_and_never_change() -> None:
    left, _ = pair()
    with pytest.raises(RuntimeError, match="entry x has its terms already"):
        left.link.open(terms())
    for name in ("terms", "name", "counters"):
        with pytest.raises(AttributeError):
            setattr(left.link, name, None)
    with pytest.raises(AttributeError):
        left.link.terms.gradient_codec = "other"  # type: ignore[misc]


def test_a_link_that_was_lost_during_its_handshake_says_so() -> None:
    left, right = memory_pair("entry x", ByteCounters(), ByteCounters())
    left.close()
    with pytest.raises(PeerLost, match="entry x was lost during the handshake"):
        right.open(terms())


@pytest.mark.parametrize(
    ("codecs", "window"), [(("int3", "raw"), 1), (("raw", "int3"), 1), (("raw", ""), 1), (("raw", "raw"), 0)]
)
def test_a_ready_of_no_use_is_refused(codecs: tuple[str, str], window: int) -> None:
    answer = pb.Ready(window=window, activation_codec=codecs[0], gradient_codec=codecs[1])
    with pytest.raises(
        ProtocolError, match=f"entry x granted the codecs '{codecs[0]}' and '{codecs[1]}' and window {window}"
    ):
        terms(answer=answer)


def test_what_others_send_waits_until_the_handshake_has_been_answered() -> None:
    kinds: list[int] = []
    left, right = memory_pair("entry x", ByteCounters(), ByteCounters())
    left.receive = lambda data: kinds.append(pb.Header.FromString(data[4:]).kind)  # type: ignore[method-assign, assignment]
    begun = threading.Event()

    def close_step() -> None:
        begun.set()
        right.send(pb.Header(kind=pb.STEP_CLOSE))

    with right.holding_back():
        right.open(terms())
        host = threading.Thread(target=close_step)
        host.start()
        assert begun.wait(30)
        right.send(pb.Header(kind=pb.READY))
    host.join(30)
    assert kinds == [pb.READY, pb.STEP_CLOSE]


def test_only_the_codec_of_the_terms_and_the_lossless_one_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherCodec(RawCodec):
        name = "other"

    monkeypatch.setitem(CODECS, "other", OtherCodec())
    left, right = pair()
    right.link.receive(chunk(codec="other"))
    assert "codec 'other' on a link that agreed on 'raw'" in left.reasons[0]


def test_hidden_states_and_their_gradients_have_a_codec_each() -> None:
    frames: list[Frame] = []
    answer = pb.Ready(window=1, activation_codec="int8", gradient_codec="int4")
    left, _ = open_pair(terms(answer=answer), terms(answer=answer, on_frame=lambda _, frame: frames.append(frame)))
    for kind in (pb.ACT, pb.KV_STEP, pb.GRAD):
        left.send(pb.Header(kind=kind), torch.ones(1, 2, 64))
    left.send(pb.Header(kind=pb.LABELS), torch.tensor([[2**40 + 1]]))
    assert [frame.header.tensor.codec for frame in frames] == ["int8", "int8", "int4", "raw"]


@pytest.mark.parametrize("kind", [pb.ACT, pb.GRAD])
def test_the_codec_of_the_other_kind_is_refused(kind: pb.Kind) -> None:
    reasons: list[str] = []
    answer = pb.Ready(window=1, activation_codec="bf16", gradient_codec="int8")
    _, right = open_pair(terms(answer=answer), terms(answer=answer, on_lost=lambda _, reason: reasons.append(reason)))
    codec, total_bytes = ("int8", 66) if kind == pb.ACT else ("bf16", 128)
    right.receive(
        chunk(kind=kind, shape=(1, 1, 64), codec=codec, total_bytes=total_bytes, payload=total_bytes, last=True)
    )
    assert f"codec {codec!r} on a link that agreed on" in reasons[0]


# ---------------------------------------------------------------- what honest ends do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mebibytes", [2.5, 2.0, 0.0])
def test_a_tensor_arrives_bit_for_bit(dtype: torch.dtype, mebibytes: float) -> None:
    left, right = pair()
    elements = int(mebibytes * (1 << 20)) // dtype.itemsize
    tensor = torch.randn(1, 2, elements // 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    left.link.send(pb.Header(kind=pb.ACT, phase=pb.TRAIN, step=3, micro_batch=1, row_lengths=[2]), tensor)
    (frame,) = right.frames
    assert frame.tensor is not None
    assert (frame.tensor.dtype, frame.tensor.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(frame.tensor, tensor)
    assert (frame.header.step, frame.header.micro_batch, list(frame.header.row_lengths)) == (3, 1, [2])
    (count,) = right.link.counters.report()
    assert count.messages == max(1, -(-tensor.nbytes // CHUNK_BYTES))


def test_labels_arrive_number_for_number() -> None:
    left, right = pair()
    labels = torch.tensor([[1, -100, 2**40], [0, -(2**63), 2**63 - 1]])
    left.link.send(pb.Header(kind=pb.LABELS, micro_batch=1), labels)
    assert torch.equal(right.frames[0].tensor, labels)
    assert right.frames[0].tensor.dtype == torch.int64


@pytest.mark.parametrize("kind", [pb.STEP_READY, pb.STEP_APPLY, pb.KV_DROP])
def test_kinds_of_later_versions_that_are_understood_now(kind: pb.Kind) -> None:
    left, right = pair()
    header = pb.Header(kind=kind, step=2)
    if kind == pb.STEP_APPLY:
        header.step_apply.CopyFrom(pb.StepApply(scale=0.5))
    left.link.send(header)
    assert (right.frames[0].header.kind, right.frames[0].header.step_apply) == (kind, header.step_apply)


def test_hidden_states_of_a_generation_and_labels_wait_behind_gradients() -> None:
    outbox: list[int] = []

    class Queued(Link):
        def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
            outbox.append(priority)

    link = Queued("x", ByteCounters())
    link.open(terms())
    link.send(pb.Header(kind=pb.KV_STEP), torch.zeros(1, 1, 4))
    link.send(pb.Header(kind=pb.LABELS), torch.zeros(1, 1, dtype=torch.int64))
    link.send(pb.Header(kind=pb.GRAD), torch.zeros(1, 1, 4))
    for kind in (pb.KV_DROP, pb.STEP_READY, pb.STEP_APPLY):
        link.send(pb.Header(kind=kind))
    assert outbox == [ACTIVATIONS, ACTIVATIONS, GRADIENTS, CONTROL, CONTROL, CONTROL]


def test_a_tensor_that_is_a_view_arrives_as_it_looks() -> None:
    left, right = pair()
    tensor = torch.arange(24.0).view(2, 3, 4).transpose(0, 1)
    left.link.send(pb.Header(kind=pb.GRAD), tensor)
    assert torch.equal(right.frames[0].tensor, tensor)


def test_nan_infinity_and_negative_zero_keep_their_bits() -> None:
    left, right = pair()
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    left.link.send(pb.Header(kind=pb.GRAD), tensor)
    assert torch.equal(right.frames[0].tensor.view(torch.int32), tensor.view(torch.int32))


def test_both_ends_count_the_same_bytes() -> None:
    left, right = pair()
    tensor = torch.zeros(1, 1, 655_360)
    left.link.send(pb.Header(kind=pb.ACT), tensor)
    left.link.send(pb.Header(kind=pb.PING))
    right.link.send(pb.Header(kind=pb.GRAD_END))
    for sender, receiver in ((left, right), (right, left)):
        sent = [c for c in sender.link.counters.report() if c.direction == "sent"]
        received = [c for c in receiver.link.counters.report() if c.direction == "received"]
        assert sent
        for one, other in zip(sent, received, strict=True):
            other.direction = "sent"
            assert one == other
        assert sender.link.counters.total("sent") == receiver.link.counters.total("received")
    activation = next(c for c in left.link.counters.report() if c.kind == "ACT")
    assert activation.payload_bytes == tensor.nbytes
    assert activation.messages == (count := tensor.nbytes // CHUNK_BYTES)
    assert count * (4 + GRPC_MESSAGE_FRAME_BYTES) < activation.framing_bytes < count * 100


def test_every_message_says_how_many_have_come_and_signs_are_not_counted() -> None:
    left, right = pair()
    right.link.send(pb.Header(kind=pb.STEP_CLOSE))
    right.link.send(pb.Header(kind=pb.PING))
    right.link.send(pb.Header(kind=pb.GRAD), torch.zeros(1, 1, CHUNK_BYTES // 2))  # of two chunks
    sent: list[bytes] = []
    left.link.peer.receive = sent.append  # type: ignore[method-assign, assignment]
    left.link.send(pb.Header(kind=pb.ACT), torch.zeros(1, 1, 5 * CHUNK_BYTES // 8))  # two chunks and a half
    left.link.send(pb.Header(kind=pb.DONE))
    headers = [pb.Header.FromString(m[4 : 4 + struct.unpack_from("<I", m)[0]]) for m in sent]
    assert [h.ack for h in headers] == [3, 3, 3, 3]
    assert [h.last_chunk for h in headers] == [False, False, True, True]
    assert [h.tensor.offset for h in headers[:3]] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_the_outbox_sends_control_then_gradients_then_activations_between_chunks() -> None:
    outbox = Outbox()
    outbox.put(ACTIVATIONS, [b"act 0", b"act 1", b"act 2"])
    sender = iter(outbox)
    assert next(sender) == b"act 0"
    outbox.put(GRADIENTS, [b"grad 0", b"grad 1"])
    assert next(sender) == b"grad 0"
    outbox.put(CONTROL, [b"close"])
    outbox.put(ACTIVATIONS, [b"act' 0"])
    outbox.close()
    assert list(sender) == [b"close", b"grad 1", b"act 1", b"act 2", b"act' 0"]


def test_of_a_lost_link_only_the_farewell_is_sent() -> None:
    outbox = Outbox()
    outbox.put(ACTIVATIONS, [b"act"])
    outbox.put(CONTROL, [b"farewell"])
    outbox.put(GRADIENTS, [b"grad"])
    outbox.close(drop_data=True)
    assert list(outbox) == [b"farewell"]


def test_a_gradient_overtakes_an_activation_between_its_chunks() -> None:
    """What a sender interleaves, a receiver puts together: each priority has its own open tensor."""

    class Queued(Link):
        def _transmit(self, priority: int, messages: list[bytes], left: Callable[[], None] | None) -> None:
            outbox.put(priority, messages, None, left)

    outbox, sender = Outbox(), Queued("x", ByteCounters())
    sender.open(terms())
    activation, gradient = torch.full((1, 1, 655_360), 2.0), torch.full((1, 1, 400_000), 3.0)
    sender.send(pb.Header(kind=pb.ACT, micro_batch=1), activation)
    messages = iter(outbox)
    _, right = pair()
    right.link.receive(next(messages))
    sender.send(pb.Header(kind=pb.GRAD, micro_batch=0), gradient)
    outbox.close()
    for later in messages:
        right.link.receive(later)
    assert [frame.header.kind for frame in right.frames] == [pb.GRAD, pb.ACT]
    assert torch.equal(right.frames[0].tensor, gradient)
    assert torch.equal(right.frames[1].tensor, activation)


def test_a_ping_is_answered_with_our_progress() -> None:
    left, right = pair()
    right.link.note_progress(pb.TRAIN, 7)
    heard: list[pb.Header] = []
    left.link.receive = lambda m: heard.append(pb.Header.FromString(m[4:]))  # type: ignore[method-assign, assignment]
    left.link.send(pb.Header(kind=pb.PING))
    assert (heard[0].kind, heard[0].progress.step) == (pb.PONG, 7)
    assert right.frames == []


def test_closing_tells_the_other_end_once_and_drops_what_is_sent_later() -> None:
    left, right = pair()
    left.link.close()
    left.link.send(pb.Header(kind=pb.DONE))
    right.link.lost("again")
    assert right.reasons == ["the other end closed the link"]
    assert (left.reasons, right.frames) == ([], [])


# ---------------------------------------------------------------- what others may send

HOSTILE = {
    "too short": (b"\1\0\0", "shorter than its own length field"),
    "empty": (b"", "shorter than its own length field"),
    "header beyond the message": (struct.pack("<I", 50) + b"short", "a header of 50 bytes in a message of 9"),
    "header above the limit": (struct.pack("<I", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1), "a header of"),
    "garbage header": (struct.pack("<I", 4) + b"\xff\xff\xff\xff", "a header that cannot be read"),
    "not the shape's bytes": (chunk(total_bytes=100), "announces 100 bytes; it has 2621440"),
    "claims a terabyte": (chunk(shape=(1 << 12, 1 << 12, 1 << 14), payload=0), f"plan allows {LIMIT}"),
    "one element too many": (chunk(shape=(1, 1, LIMIT // 4 + 1)), f"{LIMIT + 4} bytes; this link's plan allows {LIMIT}"),
    "unknown dtype": (chunk(dtype="float64"), "dtype 'float64'; known: float32, bfloat16"),
    "unknown codec": (chunk(codec="int3"), "codec 'int3' is not known"),
    "five dimensions": (chunk(shape=(1, 1, 1, 1, 655_360), payload=0), "5 dimensions"),
    "no dimensions": (message(pb.Header(kind=pb.ACT, tensor=pb.Tensor(dtype="float32", codec="raw"))), "0 dimensions"),
    "later chunk first": (chunk(1), "before its first"),
    "chunk too long": (chunk(0, MAX_CHUNK_BYTES + 1), f"chunk 0 has {MAX_CHUNK_BYTES + 1} bytes"),
    "chunk too short": (chunk(0, 10), "chunk 0 has 10 bytes"),
    "chunk number beside its offset": (chunk(0, chunk=5), "before its first"),
    "a crumb": (chunk(0, MIN_CHUNK_BYTES - 1), f"with {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes"),
    "nothing, and more to come": (chunk(0, 0), f"with {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes"),
    "numbers as hidden states": (chunk(dtype="int64", total_bytes=2 * 4 * 655_360), "dtype 'int64'"),
    "hidden states as labels": (chunk(kind=pb.LABELS), "dtype 'float32'; known: int64"),
    "a tensor in a control frame": (chunk(kind=pb.PING), f"a tensor in a frame of kind {pb.PING}"),
    "bytes without a tensor": (message(pb.Header(kind=pb.DONE), b"x"), "1 bytes without a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_message_ends_the_link_and_its_sender_hears_why(case: str) -> None:
    data, reason = HOSTILE[case]
    left, right = pair()
    right.link.receive(data)
    assert right.link.closed
    assert len(right.reasons) == 1
    assert left.reasons[0].startswith("the other end reports protocol: ")
    assert reason in left.reasons[0]
    assert right.frames == []


def test_the_end_that_found_a_hostile_message_names_it_too() -> None:
    _, right = pair()
    right.link.receive(b"")
    assert right.reasons[0].startswith("the other end broke the protocol: a message of 0 bytes")


@pytest.mark.parametrize("case", ["not the shape's bytes", "claims a terabyte", "unknown dtype", "five dimensions"])
def test_nothing_is_allocated_for_a_tensor_that_is_refused(case: str) -> None:
    _, right = pair()
    right.link.receive(HOSTILE[case][0])
    assert right.link.pending_bytes == 0


@pytest.mark.parametrize(
    "sizes",
    [
        [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, 1 << 19],
        [MIN_CHUNK_BYTES] * 160,
        [MIN_CHUNK_BYTES, MAX_CHUNK_BYTES, 100_000, MAX_CHUNK_BYTES, (1 << 19) - MIN_CHUNK_BYTES - 100_000],
        [MAX_CHUNK_BYTES, MAX_CHUNK_BYTES, (1 << 19) - 1, 1],
    ],
)
def test_the_sender_chooses_the_sizes_of_the_chunks(sizes: list[int]) -> None:
    _, right = pair()
    total, offset = 4 * 655_360, 0
    for number, size in enumerate(sizes):
        assert right.frames == []
        right.link.receive(chunk(number, size, offset=offset, last=offset + size == total))
        offset += size
    assert offset == total, "the test must send it all"
    assert len(right.frames) == 1
    assert not right.link.closed


SECOND = {
    "overlapping offset": (chunk(1, offset=MAX_CHUNK_BYTES // 2), "chunk 1"),
    "offset beyond the end": (chunk(1, payload=MAX_CHUNK_BYTES, offset=10 * MAX_CHUNK_BYTES), "chunk 1 has"),
    "another size": (chunk(1, total_bytes=2 << 20), "does not belong"),
    "ends too early": (chunk(1, last=True), "ended after 2097152"),
    "a chunk left out": (chunk(2, last=True), "chunk 2"),
    "the same chunk again": (chunk(1), "chunk 1"),
    "another shape": (chunk(1, shape=(1, 655_360, 1)), "does not belong"),
    "another dtype": (chunk(1, dtype="bfloat16"), "does not belong"),
    "another codec": (chunk(1, codec="int3"), "does not belong"),
    "another tensor": (chunk(0), "began before the one before it was complete"),
    "a crumb": (chunk(1, MIN_CHUNK_BYTES - 1), f"with {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes"),
    "another kind in its queue": (chunk(1, kind=pb.KV_STEP), "does not belong"),
}


@pytest.mark.parametrize("case", SECOND)
def test_a_wrong_later_chunk_ends_the_link(case: str) -> None:
    data, reason = SECOND[case]
    left, right = pair()
    right.link.receive(chunk(0))
    if case == "the same chunk again":
        right.link.receive(data)
    assert not right.link.closed
    right.link.receive(data)
    assert right.frames == []
    assert right.link.closed, "the link took it"
    assert reason in left.reasons[0]


@pytest.mark.parametrize("meta", [{"codec": "int3"}, {"shape": (7,)}, {"dtype": "bfloat16"}, {"dtype": "nonsense"}])
def test_a_last_chunk_that_describes_another_tensor_ends_the_link(meta: dict[str, Any]) -> None:
    _, right = pair()
    right.link.receive(chunk(0))
    right.link.receive(chunk(1))
    header = pb.Header.FromString((whole := chunk(2, last=True))[4 : 4 + struct.unpack_from("<I", whole)[0]])
    for key, value in meta.items():
        header.tensor.ClearField(key)
        header.tensor.MergeFrom(pb.Tensor(**{key: value}))
    right.link.receive(message(header, bytes(MAX_CHUNK_BYTES // 2)))
    assert right.frames == []
    assert right.link.closed


def test_a_tensor_without_elements_and_with_huge_sides_ends_the_link() -> None:
    _, right = pair()
    side = 2**32 - 1
    meta = pb.Tensor(dtype="float32", shape=(0, side, side, side), codec="raw")
    right.link.receive(message(pb.Header(kind=pb.ACT, last_chunk=True, tensor=meta)))
    assert right.link.closed
    assert "a side may have" in right.reasons[0]


def test_nothing_is_delivered_after_the_link_was_ended() -> None:
    _, right = pair()
    right.link.receive(b"")
    right.link.receive(message(pb.Header(kind=pb.DONE)))
    assert right.frames == []


def test_a_frame_of_another_job_ends_the_link() -> None:
    left, right = pair(job_token=3)
    right.link.receive(message(pb.Header(kind=pb.DONE, job_token=4)))
    assert "a frame of job 4 on a link of job 3" in left.reasons[0]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_kind_is_answered_and_the_link_lives(kind: pb.Kind) -> None:
    left, right = pair()
    left.link.send(pb.Header(kind=kind))
    (answer,) = left.frames
    assert answer.header.kind == pb.ERROR
    assert (answer.header.error.code, answer.header.error.scope) == ("unsupported", "unit")
    assert f"kind {kind} " in answer.header.error.text
    left.link.send(pb.Header(kind=pb.DONE))
    assert [frame.header.kind for frame in right.frames] == [pb.DONE]
    assert [left.link.closed, right.link.closed] == [False, False]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_kind_that_is_optional_is_skipped(kind: pb.Kind) -> None:
    left, right = pair()
    left.link.send(pb.Header(kind=kind, optional=True))
    assert (left.frames, right.frames, left.reasons, right.reasons) == ([], [], [], [])


def test_an_error_for_the_route_ends_the_link() -> None:
    left, right = pair()
    left.link.send(pb.Header(kind=pb.ERROR, error=pb.Error(code="memory", scope="route", text="no room")))
    assert right.reasons == ["the other end reports memory: no room"]


tensors = st.builds(
    pb.Tensor,
    dtype=st.sampled_from(["float32", "bfloat16", "int64", "int4", ""]),
    shape=st.lists(st.sampled_from([0, 1, 2, 64, 2**31, 2**32 - 1]), max_size=6),
    codec=st.sampled_from(["raw", "raw", "x"]),
    total_bytes=st.sampled_from([0, 4, 8, 256, 2**20, 2**63]),
    chunk=st.integers(0, 2),
    offset=st.sampled_from([0, 1, 2**20, 2**21, 2**63]),
)
headers = st.builds(
    pb.Header,
    kind=st.sampled_from([*pb.Kind.values(), 99]),
    last_chunk=st.booleans(),
    optional=st.booleans(),
    tensor=st.none() | tensors,
)
messages = st.binary(max_size=64) | st.builds(message, headers, st.binary(max_size=16))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(messages, max_size=4))
def test_no_bytes_raise_or_take_more_than_the_limit(received: list[bytes]) -> None:
    _, right = pair()
    for data in received:
        right.link.receive(data)
    assert right.link.pending_bytes <= 2 * LIMIT
    assert len(right.reasons) <= 1
