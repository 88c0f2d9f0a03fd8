"""Runs of one server use the nodes one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgelam_fl.errors import Busy
from edgelam_fl.telemetry.events import Event, RunWaits
from server.run_queue import Ahead, QueueTiming, Ticket, turn, turn_now
from tests.by_hand import HandClock
from tests.unit.conftest import MakeFederation


def test_runs_come_in_the_order_of_their_places(tmp_path: Path) -> None:
    first, second, third = (Ticket(tmp_path, name) for name in ("a", "b", "c"))
    assert first.ahead() == []
    assert third.ahead() == [Ahead("a", ()), Ahead("b", ())]
    first.uses(["edge-1", "device-1"], "a/1/1")
    assert second.ahead() == [Ahead("a", ("device-1", "edge-1"), "a/1/1")]
    first.uses(["e"], "a/2/1")
    assert second.ahead() == [Ahead("a", ("e",), "a/2/1")], "the newest list alone, though it is shorter"
    second.leave()
    first.leave()
    fourth = Ticket(tmp_path, "d")
    assert third.ahead() == []
    assert fourth.ahead() == [Ahead("c", ())]
    third.leave()
    fourth.leave()
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_nobody_waits_for_a_run_that_was_killed_and_its_job_is_known_to_the_next(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, server.run_queue as q; t = q.Ticket(pathlib.Path(sys.argv[1]), 'dead'); t.uses('e', 'dead/1/1');"
        "print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        ticket, later = Ticket(tmp_path, "next"), Ticket(tmp_path, "later")
        assert ticket.ahead() == [Ahead("dead", ("e",), "dead/1/1")]
        child.kill()
        child.wait()
        assert [run.run for run in later.ahead()] == ["next"]
        assert ticket.ahead() == []
        assert (ticket.left_over, later.left_over) == (("dead/1/1",), ())
    ticket.leave()
    later.leave()


def test_a_run_that_waits_says_for_whom_every_ten_seconds(tmp_path: Path) -> None:
    clock, events = HandClock(), list[Event]()
    first = Ticket(tmp_path, "a")
    first.uses(["edge-1"], "a/1/1")

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now_s >= 25:
            first.leave()

    with turn(str(tmp_path), "b", events.append, QueueTiming(now=clock.now, sleep=sleep)) as ticket:
        assert ticket is not None
        assert ticket.ahead() == []
    assert [event.seconds for event in events if isinstance(event, RunWaits)] == [0, 10, 20]
    assert {event.words() for event in events if isinstance(event, RunWaits)} == {"waits for run a, which uses edge-1"}
    assert clock.now_s == 25


def test_a_long_wait_is_a_short_file(tmp_path: Path) -> None:
    clock, events = HandClock(), list[Event]()
    first = Ticket(tmp_path, "a")

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now_s >= 86400:
            first.leave()

    with turn(str(tmp_path), "b", events.append, QueueTiming(now=clock.now, sleep=sleep, poll_s=60)):
        pass
    assert 100 < len(events) < 500


def test_who_does_not_wait_is_told_who_is_before(tmp_path: Path) -> None:
    with turn_now(str(tmp_path), "chat with a") as ticket:
        assert ticket is not None
        ticket.uses(["edge-1"], "a/1/1")
        said = "busy: this waits for run chat with a, which uses edge-1. Try again when that has ended"
        with pytest.raises(Busy, match=said), turn_now(str(tmp_path), "b"):
            pytest.fail("it is not its turn")
    with turn_now(str(tmp_path), "b"), turn_now("", "c") as ticket:
        assert ticket is None, "a server without a queue"


def test_plans_say_that_the_run_is_alone_and_the_place_says_which_nodes_it_uses(
    federation: MakeFederation, tmp_path: Path
) -> None:
    run = federation("ab", "e", "federation.rounds=1")
    run.run()
    assert not any(plan.alone for node in run.nodes.values() for plan in node.plans)
    ticket = Ticket(tmp_path / "queue", "run")
    behind = Ticket(tmp_path / "queue", "other")
    run = federation("ab", "e", "federation.rounds=1", ticket=ticket)
    run.run()
    assert all(plan.alone for node in run.nodes.values() for plan in node.plans)
    assert behind.ahead() == [Ahead("run", ("a", "b", "e"), "run/2/1")]
    for one in (ticket, behind):
        one.leave()
