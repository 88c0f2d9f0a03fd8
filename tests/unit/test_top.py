from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from edgelam_fl.errors import ConfigError
from edgelam_fl.telemetry.timeline import read_phase
from edgelam_fl.telemetry.top import newest_run, snapshot, top_table
from tests.recorded import ROUNDS, STEPS, a_run, timeline_of


def test_nodes_what_they_hold_and_what_they_moved() -> None:
    events = a_run()
    shown = snapshot(events)
    assert (shown["state"], shown["round"]) == ("done", ROUNDS + 1)
    nodes = {node["name"]: node for node in shown["nodes"]}
    assert nodes["edge-1"]["holds"] == [[2, 28]]
    assert nodes["device-1"]["holds"] == [[0, 2], [28, 30]]
    assert nodes["device-1"]["bytes_up"] == ROUNDS * 4_700_123 + 500_000
    assert nodes["edge-1"]["bytes_down"] == (ROUNDS + 1) * 9_000_000


def test_the_step_rate_is_of_the_latest_round_that_trained() -> None:
    events = a_run()
    last = [e for e in events if e["event"] == "round_done"][ROUNDS - 1]
    slowest = max(device["train_seconds"] for device in last["devices"])
    assert snapshot(events)["steps_per_s"] == round(STEPS / slowest, 4)
    assert snapshot(events[:3])["steps_per_s"] is None


def test_busy_and_waiting_are_the_newest_timelines() -> None:
    old, new = timeline_of(1), timeline_of(2)
    phase = read_phase(new)
    assert phase is not None
    nodes = {node["name"]: node for node in snapshot([*a_run(), old, new])["nodes"]}
    for name, shares in phase.shares().items():
        assert nodes[name]["computed_s"] == round(shares.computed_s, 3)
        assert nodes[name]["waited_s"] == round(shares.waited_s, 3)


def test_every_departure_has_its_reason_and_who_comes_back_is_here() -> None:
    events = a_run(lost=True)
    shown = snapshot(events)
    left = {gone["name"]: gone for gone in shown["departures"]}
    assert (left["device-3"]["round"], left["device-3"]["reason"]) == (3, "silent for 120 s")
    assert "protocol 0" in left["old-pi"]["reason"]
    states = {node["name"]: node["state"] for node in shown["nodes"]}
    assert (states["device-3"], states["device-1"]) == ("gone", "here")
    back = snapshot([*events, {"event": "node_joined", "node": "device-3", "role": "device"}])
    assert {node["name"]: node["state"] for node in back["nodes"]}["device-3"] == "here"
    assert len(back["departures"]) == len(shown["departures"])


def test_the_table_shows_names_from_outside_as_they_are() -> None:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(top_table(snapshot(a_run(evil="[bold]", lost=True))))
    text = console.export_text()
    assert "edge-1[bold]" in text
    assert "device-3[bold] left in round 3: silent for 120 s[bold]" in text


def test_the_newest_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run under"):
        newest_run(tmp_path)
    for age, name in enumerate(("new", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text("")
        os.utime(tmp_path / name / "events.jsonl", (1000 - age, 1000 - age))
    assert newest_run(tmp_path) == tmp_path / "new"
