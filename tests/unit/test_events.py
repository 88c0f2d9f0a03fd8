"""Events on their way into a file and out of it, and the page that describes them."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgelam_fl.errors import DataError
from edgelam_fl.telemetry.events import (
    EventLog,
    EventPiece,
    EventTail,
    JobDone,
    LayerSeconds,
    NodeJoined,
    NodeLost,
    PlanMade,
    RoundDone,
    RoundTimeline,
    RunDone,
    StepDone,
    TimelineInterval,
    UnknownEvent,
    of_kind,
    parse_event,
    read_events,
    read_piece,
    rounds,
)
from edgelam_fl.telemetry.events.table import EVENTS
from edgelam_fl.telemetry.records import as_json
from tests.recorded import a_classification, a_failed_run, a_run, as_events
from tools import events_page

ROOT = Path(__file__).parents[2]


def step(number: int) -> StepDone:
    return StepDone(job="run/1/1/device-1", step=number, loss=0.5, labels=3, seconds=0.25)


def steps(path: Path) -> list[int]:
    return [event.step for event in of_kind(read_events(path), StepDone)]


# ---------------------------------------------------------------- the file


def test_events_come_as_they_were_written(tmp_path: Path) -> None:
    log, tail = EventLog(tmp_path / "new" / "events.jsonl"), EventTail(tmp_path / "new" / "events.jsonl")
    assert tail.poll() == []
    log(step(1))
    (event,) = tail.poll()
    assert event.time is not None
    assert dataclasses.replace(event, time=None) == step(1)
    log(step(2))
    with log.path.open("a") as half:
        half.write('{"event": "st')
    assert [event.step for event in of_kind(tail.poll(), StepDone)] == [2]
    assert steps(log.path) == [1, 2]


def test_a_line_begins_with_time_and_kind(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log(step(1))
    line = json.loads(log.path.read_text())
    assert list(line) == ["time", "event", "job", "step", "loss", "labels", "seconds"]
    assert (line["event"], line["time"]) == ("step", round(line["time"], 3))


def test_a_log_with_a_limit_starts_a_new_file_and_keeps_one_older(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log, tail = EventLog(path, most_bytes=1000), EventTail(path)
    heard: list[int] = []
    for number in range(100):
        log(step(number))
        heard += [event.step for event in of_kind(tail.poll(), StepDone)]
        assert path.stat().st_size < 1000 + 150
    assert heard == list(range(100)), "a follower misses nothing that was there when it looked"
    kept = steps(path.with_name("events.jsonl.old")) + steps(path)
    assert kept == list(range(100 - len(kept), 100))
    assert 1000 <= path.with_name("events.jsonl.old").stat().st_size < 1150
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "events.jsonl.old"]
    log.close()
    log(step(100))
    assert steps(path)[-1] == 99, "a closed log stays as it is"


def test_a_run_keeps_all_events_in_packed_files(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log, tail = EventLog(path, most_bytes=1000, keeps_all=True), EventTail(path)
    heard: list[int] = []
    for number in range(100):
        log(step(number))
        if number % 7 == 0:  # between two looks, the file may have been set aside
            heard += [event.step for event in of_kind(tail.poll(), StepDone)]
    heard += [event.step for event in of_kind(tail.poll(), StepDone)]
    assert heard == steps(path) == list(range(100))
    assert [event.step for event in of_kind(EventTail(path).poll(), StepDone)] == list(range(100))
    packed = sorted(file.name for file in tmp_path.iterdir())
    assert packed[:2] == ["events-000001.jsonl.gz", "events-000002.jsonl.gz"]
    assert packed[-1] == "events.jsonl"
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size < 100 * 150 / 3


def test_pieces_of_packed_and_of_growing_files_are_all_that_was_said(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_piece(path) == EventPiece(lines="", part=1, offset=0)
    log, read = EventLog(path, most_bytes=1000, keeps_all=True), ""
    part, offset, numbers = 1, 0, range(60)
    for number in numbers:
        log(step(number))
        if number % 7 == 0:  # a reader who comes seldom, and takes little at a time
            for _ in range(9):
                piece = read_piece(path, part, offset, most_bytes=50)
                read, part, offset = read + piece.lines, piece.part, piece.offset
    while (piece := read_piece(path, part, offset, most_bytes=50)) != EventPiece(lines="", part=part, offset=offset):
        read, part, offset = read + piece.lines, piece.part, piece.offset
    assert [json.loads(line)["step"] for line in read.splitlines()] == list(numbers)
    assert part > 3
    with path.open("a") as file:
        file.write('{"event": "half')
    assert read_piece(path, part, offset).lines == ""


def test_kinds_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1.0, "event": "step", "damaged": \n{"time": 2.0, "event": "run_done", "summary": ""}\n')
    assert [type(event) for event in read_events(path, [RunDone])] == [RunDone]
    with pytest.raises(DataError):
        list(read_events(path))


def test_a_file_that_was_set_aside_and_never_packed_is_read_and_packed_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = '{"event": "step", "step": %d}\n'
    (tmp_path / "events-000001.jsonl").write_text(line % 0 * 10)
    path.write_text(line % 1 * 100)
    (tmp_path / "events-note.jsonl").write_text("not one of them")
    assert steps(path) == [0] * 10 + [1] * 100
    EventLog(path, most_bytes=1000, keeps_all=True)(step(2))
    assert steps(path) == [0] * 10 + [1] * 100 + [2]
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["events-000001.jsonl.gz", "events-000002.jsonl.gz", "events-note.jsonl", "events.jsonl"]


def test_a_limit_counts_what_an_earlier_process_wrote(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "step": 0}\n' * 10)
    EventLog(path, most_bytes=100)(step(1))
    assert steps(path) == [1]


def test_without_a_limit_it_grows(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for number in range(100):
        log(step(number))
    assert steps(log.path) == list(range(100))


def open_files(folder: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if Path(file.path).is_relative_to(folder)]


def test_events_follow_a_folder_that_is_moved_and_begin_a_file_that_is_removed_again(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "a" / "events.jsonl", most_bytes=1000)
    log(step(1))
    (tmp_path / "a").rename(tmp_path / "b")
    log(step(2))
    moved = tmp_path / "b" / "events.jsonl"
    assert steps(moved) == [1, 2]
    assert log.sync() == moved.stat().st_size
    (tmp_path / "b").rename(tmp_path / "a")
    log.path.unlink()
    for number in range(3, 40):  # some of them after the file was set aside
        log(step(number))
    assert steps(log.path.with_name("events.jsonl.old"))[-1] + 1 == steps(log.path)[0]
    assert steps(log.path)[-1] == 39
    assert open_files(tmp_path) == [str(log.path)]
    del log
    assert open_files(tmp_path) == [], "a log that nobody closes"


# ---------------------------------------------------------------- what a line holds


@pytest.mark.parametrize(
    "line",
    [
        {"event": "node_lost", "round": 2, "node": "b", "reason": "no reply"},
        {"event": "job_done", "job": "run/1/1/d", "state": "done", "error": ""},
        {"event": "run_done", "summary": "summary.json"},
        {"event": "timeline", "round": 1, "nodes": {"e": [["send", "host", 0.25, None, 3, 1, "device-2"]]}},
        {
            "event": "node_joined", "node": "pi", "role": "device", "address": "", "examples": 9, "held_out": 1,
            "memory_available_bytes": 7, "cpu_threads": 4, "tags": ["desk"], "base_seconds": {},
            "link_up_bps": 1e6, "link_down_bps": 2e6, "round_trip_s": 0.01,
            "layer_times": [{"tokens": 128, "seconds": {"fp32/fp32": 0.01}}],
        },
    ],
    ids=lambda line: line["event"],
)  # fmt: skip
def test_a_line_is_read_and_written_without_a_change(tmp_path: Path, line: dict[str, Any]) -> None:
    event = parse_event(line)
    log = EventLog(tmp_path / "events.jsonl")
    log(event)
    (written,) = log.path.read_text().splitlines()
    assert written.partition(', "event"')[2] == json.dumps(line).partition('"event"')[2]
    assert list(read_events(log.path)) == [dataclasses.replace(event, time=json.loads(written)["time"])]


def test_nested_objects_are_objects_and_arrays_are_tuples() -> None:
    joined, timeline, plan, done = as_events(
        [
            {"event": "node_joined", "node": "pi", "layer_times": [{"tokens": 128, "seconds": {"fp32/fp32": 0.01}}]},
            {"event": "timeline", "round": 1, "nodes": {"e": [["send", "host", 0.25, None, 3, 1, "d"]]}},
            {"event": "plan", "round": 1, "routes": [{"device": "d", "hops": [{"node": "e", "first": 2, "last": 4}]}]},
            {"event": "round_done", "round": 1, "hosts": [{"name": "e", "layers": [2, 4]}]},
        ]
    )
    assert isinstance(joined, NodeJoined)
    assert joined.layer_times == (LayerSeconds(tokens=128, seconds={"fp32/fp32": 0.01}),)
    assert isinstance(timeline, RoundTimeline)
    assert timeline.nodes == {"e": (TimelineInterval("send", "host", 0.25, None, 3, 1, "d"),)}
    assert isinstance(plan, PlanMade)
    assert [(hop.node, hop.first, hop.last) for hop in plan.routes[0].hops] == [("e", 2, 4)]
    assert isinstance(done, RoundDone)
    assert (done.hosts[0].name, done.hosts[0].layers) == ("e", (2, 4))


# ---------------------------------------------------------------- files of other versions


@pytest.mark.parametrize("kind", EVENTS)
def test_a_line_of_another_version_is_read(kind: str) -> None:
    bare = parse_event({"event": kind})
    assert type(bare) is EVENTS[kind]
    assert parse_event({"event": kind, "of tomorrow": [1]}) == bare
    nulls = dict.fromkeys((field.name for field in dataclasses.fields(bare)), None)
    assert parse_event({**nulls, "event": kind}) == bare, "null counts as missing"
    other_shapes = {name: "text" for name, value in as_json(bare).items() if isinstance(value, list | dict)}
    assert parse_event({"event": kind, **other_shapes}) == bare, "a container of another shape counts as empty"


def test_what_an_older_line_lacks_is_empty_or_none() -> None:
    (done,) = of_kind(as_events([{"event": "round_done", "devices": [{"name": "a"}]}]), RoundDone)
    assert (done.time, done.round, done.hosts, done.bytes_by_kind, done.virtual) == (None, 0, (), {}, None)
    (device,) = done.devices
    assert (device.bytes_up, device.loss, device.step_losses, device.metrics) == (None, None, (), {})
    (timeline,) = of_kind(as_events([{"event": "timeline", "nodes": {"a": [["send", "host"]]}}]), RoundTimeline)
    assert timeline.nodes["a"] == (TimelineInterval("send", "host", None, None, 0, 0, ""),)


def test_an_event_of_a_newer_version_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    newer = {"time": 1.0, "event": "of_tomorrow", "node": "a"}
    path.write_text("".join(json.dumps(line) + "\n" for line in (newer, {"event": "run_done"}, {"number": 1})))
    first, second, third = read_events(path)
    assert first == UnknownEvent(time=1.0, kind="of_tomorrow", fields=newer)
    assert isinstance(second, RunDone)
    assert isinstance(third, UnknownEvent)


@pytest.mark.parametrize(
    "lines", [a_run(lost=True), a_classification(), a_failed_run()], ids=["run", "sites", "failed"]
)
def test_recorded_runs_are_read_whole(lines: list[dict[str, Any]]) -> None:
    for line, event in zip(lines, as_events(lines), strict=True):
        assert type(event) is EVENTS[line["event"]]
        assert_within({name: value for name, value in line.items() if name != "event"}, as_json(event))


def assert_within(less: Any, more: Any) -> None:
    """Checks that all of `less` is in `more`; objects in `more` may have more fields."""
    if isinstance(less, dict):
        assert less.keys() <= more.keys()
        for name, value in less.items():
            assert_within(value, more[name])
    elif isinstance(less, list):
        for each, other in zip(less, more, strict=True):
            assert_within(each, other)
    else:
        assert less == more


def test_kinds_have_classes_of_their_own() -> None:
    assert len(set(EVENTS.values())) == len(EVENTS)
    assert EVENTS["job_done"] is JobDone
    assert EVENTS["node_lost"] is NodeLost


# ---------------------------------------------------------------- a new event, and the reference page


def test_a_new_event_is_one_dataclass_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what the section "An event" of docs/extending.md says."""
    section = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").partition("## An event")[2]
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)
    dataclass, line, use = (textwrap.dedent(block) for _, block in blocks[:3])
    module = dict(vars(rounds))
    exec(dataclass, module)
    kind, name = re.fullmatch(r'"(\w+)": rounds\.(\w+),\n', line).groups()
    monkeypatch.setitem(EVENTS, kind, module[name])
    log = EventLog(tmp_path / "events.jsonl")
    exec(use, {name: module[name], "emit": log})
    (event,) = read_events(log.path)
    assert type(event) is module[name]
    assert json.loads(log.path.read_text()) == {"event": kind, **as_json(event)}
    assert parse_event({"event": kind}) == module[name](node="", celsius=None), "a line of an older version"


def test_the_reference_page_is_not_stale() -> None:
    assert events_page.PAGE.read_text(encoding="utf-8") == events_page.page(), "run `python -m tools.events_page`"
