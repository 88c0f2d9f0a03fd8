"""Pace: the rate holds over every window, however the bytes come; urgent messages do not wait for it."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import pytest
import torch

from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import GRPC_MESSAGE_FRAME_BYTES
from edgelam_fl.wire.link import CHUNK_BYTES, MIN_CHUNK_BYTES, Frame
from edgelam_fl.wire.outbox import ACTIVATIONS, CONTROL, GRADIENTS, Outbox
from edgelam_fl.wire.pace import BURST_S, Pace
from tests.links import open_pair, terms

RATE = 1024.0  # a power of two, so that times are exact
BOOKED_AND_SENT = 2  # bookings of a data message: its turn, and the difference to what took that turn


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched(Pace):
    """A pace that says when its n-th booking has been made."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float], bookings: int) -> None:
        super().__init__(bytes_per_s, clock)
        self._left, self.booked = bookings, threading.Event()

    def book(self, count_bytes: float) -> float:
        moment = super().book(count_bytes)
        self._left -= 1
        if self._left == 0:
            self.booked.set()
        return moment


def size_of(cost_bytes: int) -> bytes:
    """Makes a message that costs so many bytes with gRPC's prefix."""
    return bytes(cost_bytes - GRPC_MESSAGE_FRAME_BYTES)


# ---------------------------------------------------------------- the bucket


def test_what_is_always_ready_leaves_at_the_rate() -> None:
    clock = Clock()
    pace, sizes = Pace(RATE, clock), [300, 1, 5000, 17, 800] * 20
    began = clock.now
    for size in sizes:
        clock.now = max(clock.now, pace.book(size))
    assert clock.now - began == pytest.approx((sum(sizes) - sizes[-1]) / RATE)  # the last one left, and is in debt


def test_no_window_carries_more_than_the_rate_and_a_burst() -> None:
    clock, random_ = Clock(), random.Random(1)
    pace, left = Pace(RATE, clock), list[tuple[float, int]]()
    for _ in range(400):
        clock.now += random_.choice([0.0, 0.0, 0.001, 0.5])  # also idle times, which save up no more than the burst
        size = random_.randint(1, 200)
        clock.now = max(clock.now, pace.book(size))
        left.append((clock.now, size))
    for first, (start, _) in enumerate(left):
        carried = 0
        for moment, size in left[first:]:
            carried += size
            assert carried - size <= RATE * (moment - start + BURST_S) + 1e-6


def test_a_debt_is_paid_before_more_leaves_and_what_is_given_back_counts() -> None:
    clock = Clock()
    pace = Pace(RATE, clock)
    pace.book(5000)
    assert pace.book(700) == clock.now + 5000 / RATE
    pace.book(-700)
    assert pace.book(0) == clock.now + 5000 / RATE


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_pace_that_nothing_could_keep_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Pace(rate)


# ---------------------------------------------------------------- the sender


def test_a_gradient_takes_the_turn_of_an_activation_and_pays_for_itself() -> None:
    clock = Clock()
    pace, outbox = Watched(RATE, clock, BOOKED_AND_SENT + 1), Outbox()
    sender = iter(outbox)
    outbox.put(ACTIVATIONS, [size_of(512), size_of(512)], pace)
    assert len(next(sender)) == len(size_of(512))
    heard: queue.Queue[bytes] = queue.Queue()
    waiting = threading.Thread(target=lambda: heard.put(next(sender)))  # books the turn of the second activation
    waiting.start()
    assert pace.booked.wait(30)
    outbox.put(GRADIENTS, [size_of(64)], pace)
    clock.now += 512 / RATE  # the sender looks at it again after as many real seconds
    assert len(heard.get(timeout=30)) == len(size_of(64))
    waiting.join()
    assert pace.book(0) == pytest.approx(clock.now + 64 / RATE)
    clock.now += 64 / RATE
    assert len(next(sender)) == len(size_of(512))


@pytest.fixture
def stuck() -> tuple[Outbox, Pace, queue.Queue[bytes]]:
    """An outbox whose next data message has its turn in an hour, and what its sender sends."""
    pace, outbox, sent = Watched(1.0, time.monotonic, BOOKED_AND_SENT + 1), Outbox(), queue.Queue[bytes]()

    def send() -> None:
        for message in outbox:
            sent.put(message)

    threading.Thread(target=send, daemon=True).start()
    outbox.put(ACTIVATIONS, [size_of(3600), b"late"], pace)
    assert len(sent.get(timeout=30)) == len(size_of(3600))
    assert pace.booked.wait(30)
    return outbox, pace, sent


def test_control_passes_data_that_waits_for_its_turn(stuck: tuple[Outbox, Pace, queue.Queue[bytes]]) -> None:
    outbox, pace, sent = stuck
    before = pace.book(0)
    outbox.put(CONTROL, [b"close", b"ping"], pace)
    assert [sent.get(timeout=30), sent.get(timeout=30)] == [b"close", b"ping"]
    assert pace.book(0) == pytest.approx(before + len(b"closeping") + 2 * GRPC_MESSAGE_FRAME_BYTES)  # counted, at 1 B/s
    assert sent.empty()


def test_control_of_another_link_at_the_same_pace_does_not_wait_either(
    stuck: tuple[Outbox, Pace, queue.Queue[bytes]],
) -> None:
    other = Outbox()
    other.put(CONTROL, [b"done"], stuck[1])
    other.close()
    assert list(other) == [b"done"]


def test_two_links_share_a_pace_evenly() -> None:
    """For real: the second half of their messages leaves in turns, and all of it takes what the rate says."""
    pace, count, cost = Pace(400_000.0), 20, 4000
    outboxes, sent = [Outbox(), Outbox()], list[int]()

    def send(number: int) -> None:
        for _ in outboxes[number]:
            sent.append(number)

    began = time.monotonic()
    for outbox in outboxes:
        outbox.put(ACTIVATIONS, [size_of(cost)] * count, pace)
        outbox.close()
    senders = [threading.Thread(target=send, args=(number,)) for number in (0, 1)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(timeout=30)
    assert len(sent) == 2 * count
    assert time.monotonic() - began >= (2 * count - 1) * cost / pace.bytes_per_s - BURST_S - 1e-3
    middle = sent[count // 2 : -count // 2]
    assert count // 2 - 4 <= sum(middle) <= count // 2 + 4


def test_the_sender_tells_when_the_last_of_its_messages_has_left() -> None:
    outbox, told = Outbox(), list[str]()
    outbox.put(ACTIVATIONS, [b"0", b"1"], left=lambda: told.append("act"))
    outbox.put(GRADIENTS, [b"g"], left=lambda: told.append("grad"))
    sender = iter(outbox)
    assert (next(sender), told) == (b"g", [])
    assert (next(sender), told) == (b"0", ["grad"])
    assert (next(sender), told) == (b"1", ["grad"])
    outbox.close()
    assert list(sender) == []
    assert told == ["grad", "act"]


# ---------------------------------------------------------------- the link


@pytest.mark.parametrize(
    ("bytes_per_s", "chunk_bytes"),
    [
        (None, CHUNK_BYTES),
        (1e12, CHUNK_BYTES),
        (float("inf"), CHUNK_BYTES),
        (4e6, int(4e6 * 0.05)),
        (1000.0, MIN_CHUNK_BYTES),
    ],
)
def test_chunks_are_short_in_time_and_arrive_whole(bytes_per_s: float | None, chunk_bytes: int) -> None:
    frames: list[Frame] = []
    left, right = open_pair(
        terms(pace=Pace(bytes_per_s) if bytes_per_s else None),
        terms(on_frame=lambda _, frame: frames.append(frame)),
    )
    tensor = torch.randn(1, 5, 100_001, generator=torch.Generator().manual_seed(1))
    began = time.monotonic()
    left.send(pb.Header(kind=pb.GRAD), tensor)
    assert torch.equal(frames[0].tensor, tensor)
    (count,) = right.counters.report()
    assert count.messages == -(-tensor.nbytes // chunk_bytes)
    assert time.monotonic() - began < tensor.nbytes / 1000  # in memory nothing waits


def test_a_link_tells_what_it_sent_and_when() -> None:
    told: list[tuple[pb.Header, float, float]] = []
    left, _ = open_pair(terms(on_sent=lambda header, queued, gone: told.append((header, queued, gone))), terms())
    before = time.monotonic()
    left.send(pb.Header(kind=pb.ACT, step=3), torch.zeros(1, 2, 4))
    left.send(pb.Header(kind=pb.GRAD_END, step=4))
    ((header, queued, gone),) = told
    assert (header.kind, header.step) == (pb.ACT, 3)
    assert before <= queued <= gone <= time.monotonic()
