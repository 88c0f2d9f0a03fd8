"""One message per node: replies as they arrive, and why a node is given up. By a clock that only moves in sleeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from edgelam_fl.errors import RunFailed
from edgelam_fl.wire import edgelam_pb2 as pb
from server.attempt import SiteDeadline, SiteDeadlines
from server.exchange import Arrived, Exchange, ExchangeTiming, Missing, Request
from tests.by_hand import HandClock, moves
from tests.unit.conftest import MakeFederation

pytestmark = pytest.mark.usefixtures("flower_identity")


class TimedGrid:
    """Node n is "n1", "n2", ... and answers at its time; None: never."""

    def __init__(self, *answers_at_s: float | None) -> None:
        self.clock = HandClock()
        self.answers_at_s = dict(enumerate(answers_at_s, 1))
        self.present, self.pulled, self.looks_s = set(self.answers_at_s), list[int](), list[float]()
        self.broken = set[int]()
        self._sent: dict[str, Message] = {}

    def exchange(self) -> Exchange:
        grid: Any = self
        return Exchange(grid, ExchangeTiming(now=self.clock.now, sleep=self.clock.sleep))

    def requests(self) -> Iterable[Request]:
        return [Request(f"n{node}", node, "train", RecordDict()) for node in self.answers_at_s]

    def get_node_ids(self) -> Iterable[int]:
        return self.present

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._sent = {f"m{message.metadata.dst_node_id}": message for message in messages}
        for message_id, message in self._sent.items():
            message.metadata.__dict__["_message_id"] = message_id
        return list(self._sent)

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        self.looks_s.append(self.clock.now_s)
        found = [self._sent[number] for number in ids if self._has_answered(self._sent[number])]
        self.pulled += [message.metadata.dst_node_id for message in found]
        return [self._answer(message) for message in found]

    def _has_answered(self, message: Message) -> bool:
        at_s = self.answers_at_s[message.metadata.dst_node_id]
        return at_s is not None and at_s <= self.clock.now_s

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self.broken:
            return Message(Error(code=0, reason="no endpoint"), reply_to=message)
        return Message(RecordDict({"n": ConfigRecord({"n": node})}), reply_to=message)


def answers(grid: TimedGrid, limit_s: float = 100.0, **more: Any) -> list[tuple[str, str]]:
    """Every answer as (node, reason): no reason for a reply."""
    found = list(grid.exchange().replies(grid.requests(), limit_s, **more))
    for answer in found:
        if isinstance(answer, Arrived):
            assert answer.name == f"n{answer.content['n']['n']}"
    return [(answer.name, answer.reason if isinstance(answer, Missing) else "") for answer in found]


def test_each_node_has_one_answer_in_the_order_of_arrival() -> None:
    grid = TimedGrid(20.0, 5.0, None, 10.0)
    assert answers(grid) == [("n2", ""), ("n4", ""), ("n1", ""), ("n3", "no reply within 100 s")]
    assert 100 <= grid.clock.now_s < 101


def test_a_clientapp_that_failed() -> None:
    grid = TimedGrid(0.0)
    grid.broken = {1}
    assert answers(grid) == [("n1", "its ClientApp failed: no endpoint")]


def test_a_node_that_left_is_given_up_at_once() -> None:
    grid = TimedGrid(None)
    grid.present = set()
    assert answers(grid) == [("n1", "left the federation")]
    assert grid.clock.now_s == 0


def test_a_node_that_answered_and_left_has_answered() -> None:
    grid = TimedGrid(0.0)
    grid.present = set()
    assert answers(grid) == [("n1", "")]


def test_pauses_grow_from_the_first_to_the_longest() -> None:
    grid = TimedGrid(None)
    answers(grid, 10.0)
    pauses = [round(later - sooner, 9) for sooner, later in zip(grid.looks_s, grid.looks_s[1:], strict=False)]
    assert pauses[:3] == [0.05, 0.06, 0.072]
    assert pauses[-1] == 0.5 == max(pauses)


def test_a_reply_is_followed_by_short_pauses_as_others_are_about_to_come() -> None:
    grid = TimedGrid(50.0, 90.0)
    answers(grid)
    found = next(number for number, look_s in enumerate(grid.looks_s) if look_s >= 50.0)
    before, after = (grid.looks_s[n + 1] - grid.looks_s[n] for n in (found - 1, found))
    assert (round(before, 9), round(after, 9)) == (0.5, 0.05)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_no_reply_is_kept_that_was_taken(one_by_one: bool) -> None:
    grid = TimedGrid(*[0.0] * 4)
    stream = grid.exchange().replies(grid.requests(), 100.0, one_by_one=one_by_one)
    alive = list[Any]()
    for count in range(1, 5):
        answer = next(stream)
        assert isinstance(answer, Arrived)
        alive.append(weakref.ref(answer.content))
        del answer
        gc.collect()
        assert not any(content() for content in alive)
        assert len(grid.pulled) == (count if one_by_one else 4), "the next is fetched when it is asked for"


SITE = SiteDeadline(frozenset({"n1"}), frozenset({"n2", "n3"}), limit_s=10.0)


@pytest.mark.parametrize(
    ("at_s", "late", "until_s"),
    [
        ((5.0, 1.0, None, 60.0), ["n3"], 15.0),  # its host was through at 5
        ((None, 1.0, 20.0, 60.0), ["n1"], 30.0),  # its last member was through at 20
        ((5.0, 14.0, 14.0, 60.0), [], 60.0),
        ((5.0, 14.0, 16.0, 60.0), ["n3"], 15.0),
        ((None, 1.0, None, 60.0), [], 100.0),  # neither: they may still be at work
    ],
)
def test_a_silent_node_of_a_site_that_is_through(
    at_s: tuple[float | None, ...], late: list[str], until_s: float
) -> None:
    grid = TimedGrid(*at_s)
    given_up = dict.fromkeys(late, 0.0)
    watch = SiteDeadlines([SITE], grid.clock.now)
    for answer in grid.exchange().replies(grid.requests(), 100.0, watch=watch):
        if isinstance(answer, Missing) and answer.reason == "no reply 10 s after its site":
            given_up[answer.name] = grid.clock.now_s
        last_s = grid.clock.now_s
    assert list(given_up) == late
    assert all(until_s < when_s <= until_s + 1 for when_s in given_up.values())
    assert last_s >= 60, "who is in no such site has all the time"


# ---------------------------------------------------------------- in a round


def test_every_device_gone(federation: MakeFederation) -> None:
    """They leave in the middle of a round, and the network with them: the host is asked again, and cannot answer."""
    run, plans = federation("ab", "e", "federation.rounds=1"), list[pb.Plan]()
    for name in "ab":
        run.nodes[name].leaves = lambda plan: True

    def loses(plan: pb.Plan | None) -> bool:
        plans.extend([plan] if plan else [])
        return bool(plans)

    run.nodes["e"].loses = loses
    with pytest.raises(
        RunFailed, match=r"0 devices \(none\) .* at least 1 .*a: left the federation; b: left the federation"
    ):
        run.run()


@pytest.mark.parametrize("mute", ["b", "e"])
def test_a_node_that_lost_its_message_holds_nobody_up_for_an_hour(federation: MakeFederation, mute: str) -> None:
    """Flower lists it and it answers queries; the rest of its site is through."""
    run = federation("ab", "e", "federation.rounds=1")
    run.nodes[mute].loses = lambda plan: plan is not None and plan.steps > 0
    if mute == "b":
        assert moves(run.run(), run.start)[0] == 1
    else:
        with pytest.raises(RunFailed, match=r"round 1 failed 3 times: e: no reply \d+ s after its site"):
            run.run()
    assert {event["node"] for event in run.events("node_lost")} == {mute}
    deadlines = run.nodes["a"].plans[0].deadlines
    attempts = 1 if mute == "b" else 3
    assert run.clock.now_s < attempts * (deadlines.ready_s + deadlines.step_s + 120 + 1)
