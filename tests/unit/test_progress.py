"""RoundProgress inside a round: what nodes say of their parts becomes one event, by a clock that the test sets."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

from edgelam_fl.node.telling import Telling
from edgelam_fl.telemetry.events import EVENTS_FILE, EventLog, NodeProgress, RoundProgress
from edgelam_fl.telemetry.progress import (
    PROGRESS_FILE,
    Meter,
    NodesProgress,
    ProgressTail,
    clear_progress,
    write_node_progress,
    write_progress,
)
from edgelam_fl.wire.progress import as_message, of_message
from server.signs import Signs
from tests.support import WAIT_S


def training(step: int, *, steps: int = 6, unit: int = 0, loss: float | None = None, tokens: int = 0) -> NodeProgress:
    return NodeProgress(doing="training", step=step, steps=steps, unit=unit, units=4, loss=loss, tokens=tokens)


def seen(meter: Meter, now_s: float, **nodes: NodeProgress) -> RoundProgress:
    for name, node in nodes.items():
        meter.note(name, node, now_s)
    progress = meter.progress(now_s)
    assert progress is not None
    return progress


# ---------------------------------------------------------------- from nodes to one event


def test_steps_loss_speed_and_time_left() -> None:
    meter = Meter(2, 1, began_s=100.0)
    assert meter.progress(100.0) is None, "nobody has said anything"
    begun = seen(meter, 110.0, ann=training(0), bob=training(0))
    assert (begun.round, begun.attempt, begun.seconds, begun.step, begun.steps) == (2, 1, 10.0, 0, 6)
    assert (begun.loss, begun.tokens_per_s, begun.left_s) == (None, None, None)
    assert begun.words() == "step 0 of 6"
    later = seen(meter, 130.0, ann=training(2, loss=2.0, tokens=400), bob=training(2, loss=3.0, tokens=200))
    assert (later.loss, later.tokens_per_s, later.left_s) == (2.5, 30.0, 40.0)
    assert later.words() == "step 2 of 6, loss 2.500, 30 tokens/s, about 40 s left"
    assert seen(meter, 135.0).left_s == 35.0, "it counts down between two steps"
    assert seen(meter, 135.0).done == 0.3333


def test_micro_batches_move_the_time_left_of_long_steps() -> None:
    meter = Meter(1, 1, 0.0)
    seen(meter, 0.0, ann=training(0, steps=2))
    assert seen(meter, 100.0, ann=training(0, steps=2, unit=1)).left_s == 700.0


def test_the_slowest_device_is_named_if_it_stands_out() -> None:
    meter = Meter(1, 1, 0.0)
    seen(meter, 0.0, ann=training(0), bob=training(0))
    assert seen(meter, 30.0, ann=training(3), bob=training(3)).slowest == ""
    apart = seen(meter, 40.0, ann=training(5), bob=training(3))
    assert (apart.slowest, apart.step, apart.left_s) == ("bob", 3, 20.0)
    assert apart.words().endswith("; slowest: bob")
    done = seen(meter, 50.0, ann=NodeProgress(doing="reporting", step=6, steps=6))
    assert done.step == 3, "a device that is done does not count as the one that is least far"


def test_all_wait_for_those_who_are_least_far() -> None:
    meter = Meter(1, 1, 0.0)
    fetching = NodeProgress(doing="fetching", bytes=30, of_bytes=120, steps=6)
    first = seen(meter, 1.0, ann=NodeProgress(doing="connecting", steps=6), host=fetching)
    assert first.words() == "fetching layers from the server, 25 % (host)"
    assert first.nodes is not None
    assert first.nodes["host"].words() == "fetching layers, 25 %"
    serving = NodeProgress(doing="serving", steps=6)
    second = seen(meter, 2.0, host=serving, ann=NodeProgress(doing="measuring", steps=6, unit=1, units=4))
    assert second.words() == "measuring on held-out examples, 25 % (ann)"
    answering = NodeProgress(doing="answering", steps=6, unit=8, units=32)
    assert answering.words() == "answering, 25 %"
    assert seen(meter, 2.5, ann=answering).words() == "answering held-out questions, 25 % (ann)"
    third = seen(meter, 3.0, ann=NodeProgress(doing="reporting", step=6, steps=6))
    assert third.words() == "sending what was learned (ann)"


def test_numbers_that_are_none_get_no_further_than_where_they_are_read() -> None:
    meter = Meter(1, 1, 0.0)
    for loss in (math.nan, math.inf):
        heard = of_message(as_message(training(1, loss=loss)))
        assert heard.loss is None
        assert seen(meter, 1.0, ann=heard).loss is None
    assert of_message(as_message(NodeProgress(doing="<script>"))).doing == "loading"
    honest = NodeProgress(doing="fetching", step=1, steps=2, unit=3, units=4, loss=0.5, tokens=6, bytes=7, of_bytes=8)
    assert of_message(as_message(honest)) == honest


# ---------------------------------------------------------------- how often it is told


def test_followers_hear_every_two_seconds_and_the_events_ever_more_rarely(tmp_path: Path) -> None:
    """A round of an hour may add 3 kB per device to the run's events; with one device, all of its signs fit."""
    log, told, now_s = EventLog(tmp_path / EVENTS_FILE), list[tuple[float, RoundProgress | None]](), 0.0
    signs = Signs(1, 1, 0.0, tell=lambda progress: told.append((now_s, progress)), emit=log)
    while now_s <= 3600:
        signs.hear({"ann": training(int(now_s) // 300, steps=12, loss=2.0, tokens=int(now_s))}, now_s)
        now_s += 1
    moments = [at_s for at_s, _ in told]
    assert moments[:3] == [0, 2, 4]
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [30, 60, 120, 240, 480, 960, 1920]
    assert all("nodes" not in line for line in lines)
    assert log.path.stat().st_size <= 3000
    signs.end()
    assert told[-1][1] is None


# ---------------------------------------------------------------- files


def test_a_follower_takes_each_progress_of_a_run_once(tmp_path: Path) -> None:
    follower, progress = (
        ProgressTail(tmp_path),
        RoundProgress(round=1, attempt=1, seconds=3.0, doing="training", step=1, steps=6),
    )
    assert follower.poll() is None
    write_progress(tmp_path, progress)
    found = follower.poll()
    assert found is not None
    assert found.time is not None
    assert replace(found, time=None) == progress
    assert follower.poll() is None
    for damaged in ("", "[1]", '{"event": "round_done"}', '{"event": "progress", "round": '):
        (tmp_path / "new").write_text(damaged)
        (tmp_path / "new").replace(tmp_path / PROGRESS_FILE)
        assert follower.poll() is None
    clear_progress(tmp_path)
    clear_progress(tmp_path / "not there")
    assert follower.poll() is None


def test_without_a_hub_the_nodes_of_this_machine_are_read_from_their_folders(tmp_path: Path) -> None:
    states = {name: tmp_path / name for name in ("ann", "host")}
    for state in states.values():
        state.mkdir()
    nodes = NodesProgress(states)
    assert nodes.look(0.0) is None
    write_node_progress(states["ann"], "run/1/1/ann", training(2))
    assert nodes.look(0.5) is None, "too early"
    first = nodes.look(1.0)
    assert first is not None
    assert (first.round, first.attempt, first.step) == (1, 1, 2)
    assert nodes.look(2.0) is None, "nothing new"
    write_node_progress(states["host"], "run/2/1/host", NodeProgress(doing="loading", steps=6))
    second = nodes.look(3.0)
    assert second is not None
    assert (second.round, list(second.nodes or {})) == (2, ["host"]), "ann is still in the round before"
    (states["ann"] / PROGRESS_FILE).write_text('{"job": "nonsense"}')
    assert nodes.look(4.0) is None


def test_a_node_tells_what_changes_and_its_last_word(tmp_path: Path) -> None:
    changed, said = threading.Event(), [training(0)]

    def progress() -> NodeProgress:
        if (tmp_path / PROGRESS_FILE).exists():
            changed.set()
        return said[0]

    telling = Telling(tmp_path, "run/1/1/ann", progress, every_s=0.001)
    assert changed.wait(WAIT_S)
    said[0] = NodeProgress(doing="reporting", step=6, steps=6)
    telling.close()
    last = json.loads((tmp_path / PROGRESS_FILE).read_text())
    assert last == {"job": "run/1/1/ann", "doing": "reporting", "step": 6, "steps": 6}


def test_a_full_disk_costs_the_sign_and_nothing_else(tmp_path: Path) -> None:
    write_node_progress(tmp_path / "not there", "run/1/1/ann", training(0))
    write_progress(tmp_path / "not there", RoundProgress(round=1, attempt=1, seconds=0.0, doing="training"))
