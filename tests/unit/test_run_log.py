"""What a run said, as text: at once, or as it comes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable

from rich.console import Console

from edgelam_fl.telemetry.events import Event, PlanMade, RoundProgress
from edgelam_fl.telemetry.run_log import show_log
from tests.by_hand import HandClock
from tests.recorded import a_run, as_events


class Source:
    """A run that says some of its events at each look."""

    name = "mine"

    def __init__(self, *pieces: list[Event], alive: bool | None = True) -> None:
        self.pieces, self._alive = list(pieces), alive
        self.now: Callable[[], RoundProgress] | None = None

    def poll(self) -> list[Event]:
        return self.pieces.pop(0) if self.pieces else []

    def alive(self) -> bool | None:
        return self._alive

    def progress(self) -> RoundProgress | None:
        return self.now() if self.now is not None else None


def shown(source: Source, **options: object) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    show_log(console, source, **options)  # type: ignore[arg-type]
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def timed(*lines: dict) -> list[Event]:
    return as_events({**line, "time": 1000.0 + 5 * number} for number, line in enumerate(lines))


STOPPED = {"event": "run_failed", "reason": "its operator stopped it", "kept": "nothing", "exit_code": 130}


def test_every_milestone_is_a_line_with_its_time() -> None:
    run = a_run()
    run[0]["config"]["federation"] = {"rounds": 4}
    lines = shown(Source(timed(*run)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", lines[0])
    assert "    5 s  device-1 joined (512 examples, 57 held out)" in lines
    assert any(re.match(r" +\d+ s  round 2 of 4: device-1", line) for line in lines)
    assert lines[-1].endswith("  the run is done")


def test_a_run_that_did_not_end_says_how_it_stands() -> None:
    began = timed(a_run()[0])
    waits = timed({"event": "run_waits", "run": "other", "nodes": ["ann"], "runs_ahead": 1, "seconds": 0.0})
    assert shown(Source(began))[-1] == "(the run is running)"
    assert shown(Source(waits))[-2:] == ["    0 s  waits for run other, which uses ann", "(the run is waiting)"]
    assert shown(Source(began, alive=False))[-1] == "killed: its process ended without a last word"
    assert shown(Source(alive=None)) == ["never begun: nothing was ever heard of it"]
    assert shown(Source(timed(a_run()[0], STOPPED)))[-1] == "    5 s  the run stopped: its operator stopped it; nothing"


def test_a_run_is_followed_to_its_end_and_a_killed_one_for_a_minute() -> None:
    clock = HandClock()
    events = timed(a_run()[0], STOPPED)
    lines = shown(Source(events[:1], [], [], events[1:]), follow=True, sleep=clock.sleep, now=clock.now)
    assert lines[-1].endswith("the run stopped: its operator stopped it; nothing")
    assert clock.now_s == 3
    lines = shown(Source(events[:1], alive=False), follow=True, sleep=clock.sleep, now=clock.now)
    assert lines[-1] == "killed: its process ended without a last word"
    assert clock.now_s == 63


def test_json_is_the_events_as_they_are() -> None:
    lines = [json.loads(line) for line in shown(Source(timed(*a_run()[:2])), as_json=True)]
    assert [(line["event"], line["time"]) for line in lines] == [("run_started", 1000.0), ("node_joined", 1005.0)]


def test_inside_a_round_the_log_says_every_ten_seconds_where_it_stands() -> None:
    clock = HandClock()
    events = timed(*a_run())
    begun = next(number for number, event in enumerate(events) if isinstance(event, PlanMade))
    source = Source(events[: begun + 1], *[[]] * 24, timed(STOPPED))
    began_s = events[begun].time or 0.0
    source.now = lambda: RoundProgress(
        time=began_s + clock.now_s, round=1, attempt=1, seconds=clock.now_s, doing="training", step=2, steps=6
    )
    lines = shown(source, follow=True, sleep=clock.sleep, now=clock.now)
    said = [line for line in lines if "step 2 of 6" in line]
    first = int(said[0].split()[0])
    assert [int(line.split()[0]) - first for line in said] == [0, 10]
    older = RoundProgress(time=began_s + 60, round=1, attempt=1, seconds=60.0, doing="training", step=3, steps=6)
    assert any("step 3 of 6" in line for line in shown(Source([*events[: begun + 1], older]))), "of a log from the file"
