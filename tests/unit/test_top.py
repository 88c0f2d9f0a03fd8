from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from edgelam_fl.files import Hold
from edgelam_fl.telemetry.events import NodeProgress, RoundDone, RoundProgress, RoundShares, of_kind, parse_event
from edgelam_fl.telemetry.progress import write_progress
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.run_folder import FolderSource
from edgelam_fl.telemetry.top import follow, snapshot, top_view
from tests.recorded import ROUNDS, STEPS, a_run, as_events, shares_of, timeline_of


def test_nodes_what_they_hold_and_what_they_moved() -> None:
    shown = snapshot(as_events(a_run()))
    assert (shown.state, shown.round) == ("done", ROUNDS + 1)
    nodes = {node.name: node for node in shown.nodes}
    assert nodes["edge-1"].holds == ((2, 28),)
    assert nodes["device-1"].holds == ((0, 2), (28, 30))
    assert nodes["device-1"].bytes_up == ROUNDS * 4_700_123 + 500_000
    assert nodes["edge-1"].bytes_down == (ROUNDS + 1) * 9_000_000


def test_what_is_not_used_of_a_devices_data_is_said_below_the_table() -> None:
    events = a_run()
    next(event for event in events if event["event"] == "node_joined").update(skipped=200)
    console = Console(file=io.StringIO(), width=160)
    console.print(top_view(snapshot(as_events(events))))
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert (
        "WARNING: 200 of 769 examples were left out as too long (task.max_tokens); raise task.max_tokens, or" in shown
    )


def test_json_has_every_field_also_of_what_is_not_known() -> None:
    shown = as_json(snapshot(as_events(a_run(lost=True)[:7])))
    assert list(shown) == [
        "run", "state", "round", "rounds", "seconds", "steps_per_s", "nodes", "departures", "now", "waits_for", "data",
    ]  # fmt: skip
    nodes = {node["name"]: node for node in shown["nodes"]}
    assert nodes["old-pi"] == {
        "name": "old-pi", "role": None, "state": "gone", "holds": [], "doing": "", "reason": "speaks protocol 0, this run speaks 1",
        **dict.fromkeys(("computed_s", "sent_s", "waited_s", "bytes_up", "bytes_down", "celsius")), "slowed": "",
    }  # fmt: skip
    assert nodes["edge-1"]["holds"] == [[2, 28]]


def test_heat_has_a_column_if_a_node_tells_it_and_a_line_if_it_slows_one_down() -> None:
    events = a_run()
    assert "heat" not in shown_by_top(events)
    for event in events:
        for device in event.get("devices", ()) if event["event"] == "round_done" else ():
            hot = device["name"] == "device-2"
            device |= {"celsius": 84.4, "slowed": "it is throttled"} if hot else {}
    shown = shown_by_top(events)
    assert "84 °C" in shown
    assert "device-2 was slowed down: it is throttled" in shown


def shown_by_top(events: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(top_view(snapshot(as_events(events))))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_step_rate_is_of_the_latest_round_that_trained() -> None:
    events = as_events(a_run())
    last = list(of_kind(events, RoundDone))[ROUNDS - 1]
    slowest = max(device.train_seconds or 0.0 for device in last.devices)
    assert snapshot(events).steps_per_s == round(STEPS / slowest, 4)
    assert snapshot(events[:3]).steps_per_s is None


def test_busy_and_waiting_are_the_newest_timelines() -> None:
    events = as_events([*a_run(), shares_of(timeline_of(1)), shares_of(timeline_of(2))])
    _, newest = of_kind(events, RoundShares)
    nodes = {node.name: node for node in snapshot(events).nodes}
    assert len(newest.nodes) == 4
    for name, shares in newest.nodes.items():
        assert (nodes[name].computed_s, nodes[name].waited_s) == (shares.computed_s, shares.waited_s)


def test_every_departure_has_its_reason_and_who_comes_back_is_here() -> None:
    events = as_events(a_run(lost=True))
    shown = snapshot(events)
    left = {gone.name: gone for gone in shown.departures}
    assert (left["device-3"].round, left["device-3"].reason) == (3, "silent for 120 s")
    assert "protocol 0" in left["old-pi"].reason
    states = {node.name: node.state for node in shown.nodes}
    assert (states["device-3"], states["device-1"]) == ("gone", "here")
    back = snapshot([*events, parse_event({"event": "node_joined", "node": "device-3", "role": "device"})])
    assert {node.name: node.state for node in back.nodes}["device-3"] == "here"
    assert back.departures == shown.departures


def test_a_site_that_was_lost_is_among_the_departures() -> None:
    lost = {"event": "site_lost", "time": 9.0, "round": 2, "site": "edge-1, edge-2", "missing": ["edge-2"]}
    (gone,) = snapshot(as_events([lost])).departures
    assert (gone.time, gone.round, gone.name, gone.reason) == (
        9.0,
        2,
        "edge-1, edge-2",
        "its hosts are missing: edge-2",
    )


def test_the_table_shows_names_from_outside_as_they_are() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(top_view(snapshot(as_events(a_run(evil="[bold]", lost=True)))))
    text = console.export_text()
    assert "edge-1[bold]" in text
    assert "device-3[bold] left in round 3: silent for 120 s[bold]" in text


def test_the_heading_is_one_line_and_says_how_the_run_stands(tmp_path: Path) -> None:
    def heading(*lines: dict) -> str:
        shown = Console(file=io.StringIO(), width=100)
        (tmp_path / "mine-20261129-152822").mkdir(exist_ok=True)
        file = tmp_path / "mine-20261129-152822" / "events.jsonl"
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        follow(shown, FolderSource(file.parent), once=True, as_json_text=False)
        return shown.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]

    waits = {"event": "run_waits", "time": 1.0, "run": "other", "nodes": ["ann"], "runs_ahead": 1, "seconds": 0.0}
    began = {"event": "run_started", "time": 2.0, "run": "mine-20261129-152822", "versions": {}}
    began |= {"config": {"federation": {"rounds": 2}}}
    planned = {"event": "plan", "time": 4.0, "round": 2, "attempt": 1, "selected": [], "routes": []}
    stopped = {"event": "run_failed", "time": 5.9, "reason": "its operator stopped it", "kept": "", "exit_code": 130}
    name = "mine-20261129-152822"
    assert heading() == f"{name}: never begun"
    assert heading(waits) == f"{name}: waiting"
    assert heading(began, planned) == f"{name}: running, round 2 of 2, 2.0 s"
    assert heading(began, {**planned, "round": 3}) == f"{name}: running, last evaluation, 2.0 s"
    assert heading(began, planned, stopped) == f"{name}: stopped, round 2 of 2, 3.9 s"


def test_inside_a_round_it_says_where_the_round_and_each_node_are(tmp_path: Path) -> None:
    nodes = {
        "device-1": NodeProgress(doing="training", step=2, steps=6),
        "edge-1": NodeProgress(doing="serving", step=2, steps=6),
    }
    progress = RoundProgress(round=1, attempt=1, seconds=9.0, doing="training", step=2, steps=6, loss=2.5, nodes=nodes)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in a_run()[:6]))
    write_progress(folder, progress)
    later = replace(progress, time=(as_events(a_run())[0].time or 0.0) + 75)
    assert snapshot(as_events(a_run()[:6]), progress=later).seconds == 75
    shown = Console(file=io.StringIO(), width=140)
    follow(shown, FolderSource(folder), once=True, as_json_text=False)
    lines = [" ".join(line.split()) for line in shown.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ", step 2 of 6, loss 2.500, " in lines[0]
    heading = next(line for line in lines if line.startswith("node "))
    assert heading.startswith("node holds does busy")
    assert any(line.startswith("device-1 ") and " step 2 of 6 " in line for line in lines)
    with Hold(folder):
        assert FolderSource(folder).progress() is not None
    assert FolderSource(folder).progress() is None, "its process was killed"


def test_a_run_that_waits_says_behind_which(tmp_path: Path) -> None:
    waits = {"event": "run_waits", "time": 1.0, "run": "other", "nodes": ["ann"], "runs_ahead": 2, "seconds": 83.0}
    shown = snapshot(as_events([waits]), "waiting", "mine")
    assert (shown.run, shown.waits_for) == (
        "mine",
        "waits for run other, which uses ann, and for 1 more that came earlier, for 1 min 23 s so far",
    )
