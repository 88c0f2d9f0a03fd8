"""What a link keeps to send again, what it counts, and who may go on with it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.link import GrpcLink, Stream
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING
from edgelam_fl.wire.link import CHUNK_BYTES
from edgelam_fl.wire.outbox import ACTIVATIONS, CONTROL, GRADIENTS, SIGNS, Outbox
from edgelam_fl.wire.session import ACK_EVERY_BYTES, ACK_EVERY_MESSAGES, MOST_KEPT_BYTES, Arrivals
from tests.links import Heard, hello, ready, terms
from tests.support import WAIT_S

# ---------------------------------------------------------------- the sender


def sent(outbox: Outbox, count: int, sender: object = None) -> list[bytes]:
    messages = outbox.sender(sender)
    return [next(messages) for _ in range(count)]


def test_what_is_not_acknowledged_leaves_again_on_the_next_stream_in_the_order_of_urgency() -> None:
    outbox, told = Outbox(), list[str]()
    outbox.put(ACTIVATIONS, [b"act 0", b"act 1"], left=lambda: told.append("act"))
    outbox.put(SIGNS, [b"ping"])
    assert sent(outbox, 3) == [b"ping", b"act 0", b"act 1"]
    outbox.put(GRADIENTS, [b"grad"])
    outbox.put(CONTROL, [b"close"])
    assert sent(outbox, 1) == [b"close"]
    assert outbox.restart("second", received=1) == [b"act 1", b"close"]
    assert sent(outbox, 3, "second") == [b"close", b"grad", b"act 1"]
    assert told == [], "the last chunk may not have arrived"
    outbox.acknowledge(4)
    assert told == ["act"]
    assert not outbox.has_undelivered


def test_only_the_sender_of_the_links_stream_sends() -> None:
    outbox = Outbox()
    first, second = outbox.sender(None), outbox.sender("second")
    outbox.put(CONTROL, [b"a", b"b", b"c"])
    assert next(first) == b"a"
    outbox.pause()
    assert list(first) == []
    outbox.restart("second", received=0)
    assert [next(second), next(second)] == [b"a", b"b"]
    outbox.restart("third", received=2)
    assert list(second) == []
    assert sent(outbox, 1, "third") == [b"c"]


def test_what_is_made_late_is_made_by_the_sender_in_its_turn() -> None:
    outbox, told = Outbox(), list[str]()

    def make() -> list[bytes]:
        told.append("made")
        return [b"act 0", b"act 1"]

    outbox.put_later(ACTIVATIONS, make, left=lambda: told.append("left"))
    outbox.put(ACTIVATIONS, [b"bye"])
    outbox.put(CONTROL, [b"close"])
    assert sent(outbox, 1) == [b"close"]
    assert told == []
    assert outbox.has_undelivered
    assert sent(outbox, 3) == [b"act 0", b"act 1", b"bye"]
    assert told == ["made", "left"]


def test_what_is_being_made_keeps_its_place_when_the_stream_changes() -> None:
    """The new stream's sender waits for what the old one makes, behind what has to leave again."""
    outbox, got = Outbox(), list[bytes]()
    other = threading.Thread(target=lambda: got.extend(sent(outbox, 4, "second")))

    def make() -> list[bytes]:
        outbox.pause()
        outbox.restart("second", received=0)
        other.start()
        return [b"act 1", b"act 2"]

    outbox.put(ACTIVATIONS, [b"act 0"])
    outbox.put_later(ACTIVATIONS, make)
    outbox.put(ACTIVATIONS, [b"bye"])
    first = outbox.sender(None)
    assert next(first) == b"act 0"
    assert list(first) == [], "its turn is over"
    other.join(WAIT_S)
    assert got == [b"act 0", b"act 1", b"act 2", b"bye"]


def test_what_is_dropped_while_it_is_made_does_not_leave() -> None:
    outbox = Outbox()

    def make() -> list[bytes]:
        outbox.close(drop_data=True)
        return [b"act"]

    outbox.put_later(ACTIVATIONS, make)
    assert list(outbox) == []


@pytest.mark.parametrize(("received", "words"), [(3, "3 messages acknowledged; 2 have left"), (0, "1 had been")])
def test_numbers_that_cannot_be_are_refused(received: int, words: str) -> None:
    outbox = Outbox()
    outbox.put(CONTROL, [b"a", b"b"])
    sent(outbox, 2)
    outbox.acknowledge(1)
    with pytest.raises(ProtocolError, match=words):
        outbox.restart("second", received)


def test_an_end_that_acknowledges_nothing_gets_no_more_than_is_kept_and_still_signs_of_life() -> None:
    outbox, chunk = Outbox(), bytes(1 << 20)
    outbox.put(ACTIVATIONS, [chunk] * 100)
    most = MOST_KEPT_BYTES // len(chunk)
    sent(outbox, most)
    outbox.put(CONTROL, [b"close"])
    outbox.put(SIGNS, [b"ping"])
    assert sent(outbox, 1) == [b"ping"]
    assert outbox.stuck_s >= 0
    outbox.acknowledge(1)
    assert sent(outbox, 1) == [b"close"]
    outbox.acknowledge(most)
    assert sent(outbox, 1) == [chunk]


# ---------------------------------------------------------------- the receiver


def test_an_acknowledgement_is_due_after_many_bytes_or_many_messages() -> None:
    arrivals = Arrivals()
    assert not arrivals.add(ACK_EVERY_BYTES - 1)
    assert arrivals.add(1)
    assert arrivals.tell() == 2
    assert [arrivals.add(0) for _ in range(ACK_EVERY_MESSAGES)] == [False] * (ACK_EVERY_MESSAGES - 1) + [True]


def opened(session: bytes = b"s", certificate: str = "7", **of_terms: object) -> GrpcLink:
    link = GrpcLink("entry", ByteCounters(), lambda *_: None, lambda *_: None, DEFAULT_TIMING, certificate=certificate)
    link.hello = hello(session=session)
    Stream(link)
    link.open(terms(answer=ready(job_token=0, window=9), **{"reconnect_s": 60.0, **of_terms}))  # type: ignore[arg-type]
    return link


def kinds_of(link: GrpcLink) -> Callable[[], pb.Header]:
    messages = link.outbox.sender(None)

    def header() -> pb.Header:
        data = next(messages)
        return pb.Header.FromString(data[4 : 4 + int.from_bytes(data[:4], "little")])

    return header


def test_tensors_one_way_are_acknowledged_without_a_frame_the_other_way() -> None:
    sender, receiver = opened(), opened()
    sender.send(pb.Header(kind=pb.ACT), torch.zeros(1, 1, 5 * CHUNK_BYTES // 4))
    for data in sent(sender.outbox, 5):
        receiver.take(receiver.stream, data)
    assert (header := kinds_of(receiver)()).kind == pb.ACK
    assert 4 <= header.ack <= 5


# ---------------------------------------------------------------- who may go on


def newcomer(session: bytes = b"s", certificate: str = "7", received: int = 0) -> GrpcLink:
    link = GrpcLink("from x", ByteCounters(), lambda *_: None, lambda *_: None, DEFAULT_TIMING, certificate=certificate)
    link.hello = hello(session=session, resumes=True, received=received)
    Stream(link)
    return link


@pytest.mark.parametrize("stranger", [{"session": b"guessed"}, {"session": b""}, {"certificate": "8"}])
def test_only_the_same_session_with_the_same_certificate_goes_on(stranger: dict[str, object]) -> None:
    heard, hung_up = Heard(), list[str]()
    link = opened(heard=heard)
    assert link.stream is not None
    link.stream.hang_up = lambda: hung_up.append("first")
    assert link.continue_on(newcomer(**stranger)) is None  # type: ignore[arg-type]
    assert hung_up == []
    answer = link.continue_on(newcomer())
    assert answer is not None
    assert (answer.window, answer.received) == (9, 0)
    assert hung_up == ["first"], "the older stream makes room"
    assert heard.empty()


def test_a_session_of_a_link_that_has_none_is_nobodys() -> None:
    assert opened(session=b"").continue_on(newcomer(session=b"")) is None


def test_a_link_that_was_closed_or_lost_does_not_go_on() -> None:
    for end in (GrpcLink.close, lambda link: link.lost("over")):
        link = opened()
        end(link)
        assert link.continue_on(newcomer()) is None
    assert opened(reconnect_s=0.0).continue_on(newcomer()) is None


def test_messages_of_an_older_stream_are_dropped() -> None:
    heard = Heard()
    link, other = opened(heard=heard), opened()
    older = link.stream
    assert older is not None
    other.send(pb.Header(kind=pb.STEP_CLOSE))
    (data,) = sent(other.outbox, 1)
    assert link.continue_on(newcomer()) is not None
    link.take(older, data)
    assert heard.empty()
    assert link.received == 0
