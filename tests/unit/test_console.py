from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from edgelam_fl.telemetry.console import RunView
from edgelam_fl.telemetry.events import (
    NodeProgress,
    NodeReady,
    RoundDone,
    RoundProgress,
    RoundShares,
    RunStarted,
    of_kind,
    parse_event,
)
from edgelam_fl.telemetry.waiting import SignTiming
from tests.recorded import STEPS, a_classification, a_failed_run, a_run, a_run_failed_at_once, as_events, of_privacy


def watch(
    events: Iterable[Mapping[str, Any]], *of_nodes: tuple[str, Mapping[str, Any]], rounds: int = 4
) -> tuple[str, list[str]]:
    """Returns (text printed, lines of the table) after these events, on a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    view = RunView(console, rounds, STEPS)
    for event in as_events(events):
        view.feed(event)
    for node, line in of_nodes:
        view.feed(parse_event(line), node)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    drawn = Console(file=io.StringIO(), width=80)
    drawn.print(view._draw())
    lines = drawn.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    return said, [" ".join(line.split()) for line in lines]


def test_rounds_loss_perplexity_and_bytes() -> None:
    events = a_run()
    said, lines = watch(events)
    last = [event for event in events if event["event"] == "round_done"][-3:]
    values = " > ".join(f"{event['devices'][0]['perplexity']:.1f}" for event in last)
    moved = 4 * (4_700_123 + 4_600_321) + 500_000 + 480_000
    loss = last[1]["devices"][0]["loss"]
    assert lines[0].startswith("last evaluation, ")
    assert lines[1] == "node does loss perplexity moved waited"
    assert lines[2] == f"device-1 waits {loss:.3f} {values} {moved / 1e6:.1f} MB"
    assert "round 2 of 4: device-1, device-2, device-3" in said
    assert "round 1 of 4 took 25 s; held-out perplexity at its start: device-1 " in said
    assert "last evaluation took 29 s; held-out perplexity at the end: device-1 " in said


def test_what_is_not_used_of_a_devices_data_is_said_once_when_it_joins() -> None:
    events = a_run()
    events[0]["config"]["task"] = {"max_tokens": 96}
    for event in events:
        if event["event"] == "node_joined" and event["node"] == "device-1":
            event.update(examples=500, held_out=0, cut=12, unread_fields=1)
        for device in event.get("devices", []):
            if device["name"] == "device-1":
                device.update(examples=500, held_out=0, cut=12, unread_fields=1)
    read = {
        "event": "data_read",
        "examples": 500,
        "held_out": 0,
        "cut": 12,
        "unread_fields": 1,
        "unread_names": ["source"],
    }
    said, _ = watch(events, ("device-1", read))
    for text in (
        "device-1: 12 of 500 examples were cut (task.max_tokens = 96)\n",
        "device-1: nothing is learned from 1 field of the data (data.fields)\n",
        "device-1: no example is held out, so nothing is measured there (data.held_out, --eval-data)\n",
        "device-1: fields that nothing is learned from: source\n",
    ):
        assert said.count(text) == 1


def test_a_device_in_no_round_and_one_with_less_than_a_batch_are_said_once() -> None:
    events = a_run()
    events[0]["config"]["federation"] = {"batch_size": 600}
    for event in events:
        if event["event"] == "plan":
            event["unfit"] = {"device-9": "has no tag lab (strategy.require_tags)"}
    said, _ = watch(events)
    assert said.count("device-9 is in no round: has no tag lab (strategy.require_tags)\n") == 1
    text = "512 examples are fewer than federation.batch_size = 600, so that a step learns some of them more than once"
    assert said.count(f"device-1: {text}\n") == 1
    assert f"edge-1: {text}" not in said


def test_a_run_that_ends_early_says_why_and_which_adapter_is_its_result() -> None:
    events = [
        *a_run(),
        {"event": "stopped_early", "round": 5, "planned": 9, "evaluations": 1, "best_round": 0, "best_loss": None},
        {"event": "best_taken", "round": 2, "loss": 1.23456, "last_round": 5},
    ]
    said, _ = watch(events)
    assert (
        "the run ends early after round 5 of 9, as 1 evaluation gave no lower held-out loss than none that is finite, at the start\n"
    ) in said
    assert "the result is the one after round 2 of 5, as it had the lowest held-out loss: 1.2346\n" in said


def test_measures_of_answers_are_said_as_a_mean_over_devices() -> None:
    events = a_run()
    (first, *_) = (event for event in events if event["event"] == "round_done")
    for number, device in enumerate(first["devices"]):
        device["metrics"] = {"exact_match": 0.25 * number}
    mean = 0.25 * (len(first["devices"]) - 1) / 2
    said, _ = watch(events)
    assert f"; exact_match {mean:.3f}\n" in said


def test_a_round_without_devices_says_so() -> None:
    events = a_run()
    for event in events:
        if event["event"] == "plan" and event["round"] == 1:
            event.update(selected=[], routes=[])
        if event["event"] == "round_done" and event["round"] == 1:
            event.update(devices=[], hosts=[])
    said, _ = watch(events)
    assert "round 1 of 4: no device was drawn\n" in said
    assert "round 1 of 4 took 25 s\n" in said


def test_classification_over_two_sites_with_devices_that_host() -> None:
    events = a_classification()
    hosted = {"event": "step_closed", "step": 4}
    own = {"event": "step", "step": 6, "loss": 0.5}
    said, lines = watch(events, ("edge-1", hosted), ("pi-kitchen-north", own), ("pi-kitchen-north", hosted), rounds=3)
    assert (
        "round 1 of 3: bob, pi-kitchen-north over edge-1 > pi-kitchen-north; ann, cat, pi-office over pi-office" in said
    )
    *_, newest = of_kind(as_events(events), RoundShares)
    waited = {name: f"{100 * shares.waited_s / shares.phase_s:.0f} %" for name, shares in newest.nodes.items()}
    accuracies = [e["devices"][0]["metrics"]["accuracy"] for e in events if e["event"] == "round_done"]
    ann, *_, edge, north, _ = lines[2:]
    assert lines[1] == "node does loss accuracy moved waited"
    assert " > ".join(f"{100 * value:.1f}" for value in accuracies[-3:]) + " %" in ann
    assert ann.endswith(waited["ann"])
    assert edge.startswith(f"edge-1 step 5 of {STEPS} ")
    assert north.startswith(f"pi-kitchen-north step 7 of {STEPS} 0.500 ")
    device = next(d for d in events[-2]["devices"] if d["name"] == "pi-kitchen-north")
    assert device["bytes_up"] == 500_000
    moved = 3 * (4_700_123 + 4_600_321) + 980_000 + sum(5_000_000 + number + 5_100_000 for number in range(1, 5))
    assert north.endswith(f"{moved / 1e6:.1f} MB {waited['pi-kitchen-north']}")


def test_long_names_leave_the_numbers_whole() -> None:
    names = {"device-1": "raspberry-pi-4-in-the-kitchen-behind-the-window"}
    events = [_renamed(event, names) for event in a_run()]
    _, lines = watch(events)
    assert any("waits" in line and "MB" in line for line in lines)
    assert "raspberry-pi-4-in-the-kitchen-behind-the-window" in "".join(line.split()[0] for line in lines[2:])


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def test_many_names_are_cut() -> None:
    selected = [f"d{number}" for number in range(11)]
    said, _ = watch([{"event": "plan", "round": 1, "attempt": 2, "selected": selected, "routes": []}])
    assert f"round 1 of 4, attempt 2: {', '.join(selected[:8])} and 3 more" in said


def test_failed_run() -> None:
    said, lines = watch(a_failed_run())
    assert "edge-1 did not finish round 2: silent for 120 s" in said
    assert lines[0].startswith("failed in round 2 of 4, ")
    assert not any(" waits " in line for line in lines)
    assert next(line for line in lines if line.startswith("edge-1")).startswith("edge-1 lost ")
    _, lines = watch(a_run_failed_at_once())
    assert lines[0].startswith("failed before the first round, ")


def test_where_layers_go_is_said_when_it_changes() -> None:
    hosts = [{"node": "edge-1", "first": 2, "last": 20}, {"node": "edge-2", "first": 20, "last": 28}]
    event = {
        "event": "placement", "sites": [{"hosts": hosts}], "step_s": 2.5, "reason": "the first plan", "changed": True,
        "measured": ["edge-2 took 3.0 times as long"],
    }  # fmt: skip
    said, _ = watch([event, {**event, "changed": False, "reason": "as before", "measured": []}])
    words = " ".join(said.split())
    assert "edge-1 layers 2-19, edge-2 layers 20-27: the first plan; a step of training should take 2.5 s" in words
    assert "edge-2 took 3.0 times as long" in words
    assert "as before" not in words


def test_what_a_run_promises_and_that_its_budget_is_spent() -> None:
    said, _ = watch(of_privacy())
    words = " ".join(said.split())
    assert (
        "privacy: epsilon 4 at delta 1e-05 over 3 rounds, noise 2 x the bound 1; protects one device, against strangers"
        in words
    )
    assert "the privacy budget is spent after round 3 of 4: epsilon 3.9" in words


def test_a_run_that_waits_for_another_says_so_and_for_how_long() -> None:
    waits = [
        {"event": "run_waits", "run": "mine", "nodes": ["edge-1", "pi"], "runs_ahead": 2, "seconds": seconds}
        for seconds in (0, 10)
    ]
    said, lines = watch(waits)
    words = "waits for run mine, which uses edge-1, pi, and for 1 more that came earlier"
    assert " ".join(said.split()).count(words) == 1
    assert " ".join(lines).startswith(words)


def test_a_link_that_was_measured_again_is_told() -> None:
    link = {"link_up_bps": 1.25e6, "link_down_bps": 95e6, "round_trip_s": 0.0123}
    said, _ = watch([{"event": "link_measured", "node": "pi", **link}])
    assert said.endswith("pi's link to the server now: 1.25 Mbit/s up, 95 Mbit/s down, round trip 12.3 ms\n")


# ---------------------------------------------------------------- signs of life


def lines_of_a_minute(events: Mapping[int, Iterable[Any]], *, terminal: bool = False) -> list[str]:
    """Returns what is printed in a minute of four looks per second, with these events at these seconds."""
    now_s, console = [0.0], Console(file=io.StringIO(), width=200, force_terminal=terminal)
    view = RunView(console, 3, 6, SignTiming(now=lambda: now_s[0]))
    view.expect(["ann", "edge-1"])
    for quarter in range(4 * 60):
        now_s[0] = quarter / 4
        for event, node in events.get(quarter // 4, ()) if quarter % 4 == 0 else ():
            view.feed(event, node)
        view.tick()
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def of_round(round_: int, event: str) -> Any:
    return next(one for one in as_events(a_run()) if getattr(one, "round", 0) == round_ and one_kind(one) == event)


def one_kind(event: Any) -> str:
    return "plan" if hasattr(event, "selected") else "done" if isinstance(event, RoundDone) else ""


def test_without_a_terminal_something_is_said_every_ten_seconds() -> None:
    wanted = {"federation": {"min_nodes": 2, "expect_nodes": 0}}
    started = RunStarted(run="mine", config=wanted, versions={})
    step = RoundProgress(
        round=1, attempt=1, seconds=5.0, doing="training", step=2, steps=6, loss=2.5, tokens_per_s=1234.4, left_s=60.4
    )
    events: dict[int, list[tuple[Any, str]]] = {
        1: [(started, "")],
        12: [(NodeReady(name="ann", address=""), "ann")],
        30: [(of_round(1, "plan"), ""), (step, "")],
    }
    lines = [" ".join(line.split()) for line in lines_of_a_minute(events)]
    waits = "waiting for nodes (devices: 0 of 2, edge servers: 0)"
    words = "round 1 of 3: step 2 of 6, loss 2.500, 1,234 tokens/s, about 1 min 00 s left"
    assert lines[:3] == [
        f"4 s {waits}; loading PyTorch: ann, edge-1",
        f"14 s {waits}; loading PyTorch: edge-1",
        f"24 s {waits}; loading PyTorch: edge-1",
    ]
    assert lines[3].startswith("30 s round 1 of 3: device-1")
    assert lines[4:] == [f"40 s {words}", f"50 s {words}"]


def test_on_a_terminal_the_headline_and_the_table_say_where_nodes_are() -> None:
    assert lines_of_a_minute({}, terminal=True) == [], "the table is drawn by itself"
    console = Console(file=io.StringIO(), width=100)
    view = RunView(console, 3, 6)
    nodes = {"device-1": NodeProgress(doing="training", step=2, steps=6, loss=2.5), "edge-1": NodeProgress()}
    progress = RoundProgress(round=1, attempt=1, seconds=5.0, doing="loading", nodes=nodes)
    view.feed(progress)
    assert view.status() == "the server starts the run", "a round that nobody has planned"
    view.feed(of_round(1, "plan"))
    view.feed(progress)
    console.print(view._draw())
    drawn = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert any(line.startswith("round 1 of 3: loading the model, ") for line in drawn)
    assert any(line.startswith("device-1 step 2 of 6 2.500 ") for line in drawn)
    assert any(line.startswith("edge-1 loading ") for line in drawn)


def test_after_the_first_round_the_time_of_the_whole_run_is_said() -> None:
    view = RunView(Console(file=io.StringIO()), 3, 6)
    view.feed(of_round(1, "plan"))
    step = RoundProgress(round=1, attempt=1, seconds=5.0, doing="training", step=2, steps=6, left_s=10.0)
    view.feed(step)
    assert view.status() == "round 1 of 3: step 2 of 6, about 10 s left"
    done = of_round(1, "done")
    view.feed(done)
    view.feed(of_round(2, "plan"))
    view.feed(step)
    assert view.status() == "round 2 of 3", "what comes late of a round that is over is not shown"
    view.feed(RoundProgress(round=2, attempt=1, seconds=5.0, doing="training", step=2, steps=6, left_s=10.0))
    left = f"{10 + done.seconds:.1f} s"
    assert view.status() == f"round 2 of 3: step 2 of 6, about 10 s left; about {left} left in the run"


def test_a_nodes_own_events_are_not_taken_back_by_an_older_progress() -> None:
    console = Console(file=io.StringIO(), width=100)
    view = RunView(console, 3, 6)
    view.feed(of_round(1, "plan"))

    def shown() -> str:
        console.print(view._draw())
        return next(line for line in reversed(console.file.getvalue().splitlines()) if line.startswith("device-1"))  # type: ignore[attr-defined]

    def progress(step: int, doing: str = "training") -> RoundProgress:
        nodes = {"device-1": NodeProgress(doing=doing, step=step, steps=6, loss=9.0)}
        return RoundProgress(round=1, attempt=1, seconds=5.0, doing=doing, nodes=nodes)

    view.feed(parse_event({"event": "step", "step": 2, "loss": 0.5}), "device-1")
    view.feed(progress(2))
    assert shown().split()[1:6] == ["step", "3", "of", "6", "0.500"]
    view.feed(progress(4))
    assert shown().split()[1:6] == ["step", "4", "of", "6", "9.000"]
    view.feed(parse_event({"event": "job_done", "state": "done", "error": ""}), "device-1")
    view.feed(progress(6, "reporting"))
    assert shown().split()[1] == "waits"
