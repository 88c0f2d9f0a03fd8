from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgelam_fl.telemetry.human import (
    by_name,
    human_bytes,
    human_count,
    human_layers,
    human_number,
    human_seconds,
)
from edgelam_fl.telemetry.measures import human_measure
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.summary import Summary, build_summary, read_summary
from edgelam_fl.telemetry.summary_words import counts_in_words, privacy_in_words, summary_table
from edgelam_fl.telemetry.verdict import verdict
from tests.recorded import as_events, of_privacy


def device(name: str, perplexity: float | None, *, loss: float | None = 2.0, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "examples": 90,
        "loss": loss,
        "perplexity": perplexity,
        "tokens": 100,
        "train_seconds": 4.0,
        "bytes_up": 1000,
        "bytes_down": 2000,
        "adapter_bytes_up": 10,
        "adapter_bytes_down": 20,
        "peak_rss_bytes": 500,
        "step_losses": [loss],
        **fields,
    }


def evaluated(name: str, perplexity: float) -> dict[str, Any]:
    return device(
        name, perplexity, loss=None, tokens=0, train_seconds=0.0, step_losses=[], bytes_up=7, peak_rss_bytes=600
    )


def host(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "layers": [2, 28], "bytes_up": 300, "bytes_down": 400, "peak_rss_bytes": 900, **fields}


def round_done(number: int, devices: list[dict[str, Any]], hosts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"event": "round_done", "time": 100.0 + number, "round": number, "devices": devices, "hosts": hosts}


def a_run() -> list[dict[str, Any]]:
    """Returns two rounds and the last evaluation; device-10 is lost in round 2."""
    config = {"model": {"name": "smollm2-135m"}, "task": {"kind": "causal-lm"}}
    hop = {"node": "edge-1", "first": 2, "last": 28}
    return [
        {"event": "run_started", "time": 100.0, "run": "demo", "config": config, "versions": {"torch": "2.13.0"}},
        {"event": "node_joined", "time": 100.1, "node": "device-10", "role": "device", "examples": 90, "held_out": 10},
        {
            "event": "node_joined",
            "time": 100.1,
            "node": "device-2",
            "role": "device",
            "examples": 90,
            "held_out": 9,
            "cut": 3,
        },
        {"event": "node_joined", "time": 100.2, "node": "edge-1", "role": "edge", "examples": 0},
        {"event": "plan", "time": 100.3, "round": 1, "routes": [{"device": "device-2", "hops": [hop]}]},
        round_done(1, [device("device-10", 80.0), device("device-2", 90.0)], [host("edge-1")]),
        {"event": "node_lost", "time": 101.5, "round": 2, "node": "device-10", "reason": "silent for 120 s"},
        round_done(2, [device("device-2", 30.0, tokens=300, train_seconds=6.0)], [host("edge-1", peak_rss_bytes=950)]),
        round_done(3, [evaluated("device-2", 15.5)], [host("edge-1", peak_rss_bytes=940)]),
        {"event": "run_done", "time": 104.0, "seconds": 3.75, "summary": "summary.json"},
    ]


def summary_of(lines: list[dict[str, Any]]) -> Summary:
    return build_summary(as_events(lines))


def test_whole_run() -> None:
    assert as_json(summary_of(a_run())) == {
        "run": "demo",
        "state": "done",
        "model": "smollm2-135m",
        "task": "causal-lm",
        "devices": [
            {
                "name": "device-2",
                "examples": 90,
                "held_out": 9,
                "cut": 3,
                "perplexity_before": 90.0,
                "metrics_before": {},
                "perplexity_after": 15.5,
                "metrics_after": {},
                "tokens_per_s": (100 + 300 + 0) / (4.0 + 6.0 + 0.0),
                "bytes_up": 1000 + 1000 + 7,
                "bytes_down": 3 * 2000,
                "adapter_bytes_up": 3 * 10,
                "adapter_bytes_down": 3 * 20,
                "peak_rss_bytes": 600,
            },
            {
                "name": "device-10",
                "examples": 90,
                "held_out": 10,
                "perplexity_before": 80.0,
                "metrics_before": {},
                "perplexity_after": None,
                "metrics_after": {},
                "tokens_per_s": 100 / 4.0,
                "bytes_up": 1000,
                "bytes_down": 2000,
                "adapter_bytes_up": 10,
                "adapter_bytes_down": 20,
                "peak_rss_bytes": 500,
            },
        ],
        "hosts": [
            {"name": "edge-1", "layers": [2, 28], "peak_rss_bytes": 950, "bytes_up": 3 * 300, "bytes_down": 3 * 400}
        ],
        "rounds": 2,
        "seconds": 3.75,
        "virtual": None,
        "versions": {"torch": "2.13.0"},
    }


def test_the_newest_counts_of_a_devices_data_count() -> None:
    events = a_run()
    events[5]["devices"][0].update(held_out=10, skipped=2)
    events[7]["devices"][0].update(held_out=8, cut=0, bad=7, unread_fields=2)
    two, ten = summary_of(events).devices
    assert (two.held_out, two.cut, two.skipped, two.bad, two.unread_fields) == (8, 0, 0, 7, 2)
    assert (ten.held_out, ten.skipped) == (10, 2)
    assert counts_in_words([two, ten]) == [
        "device-2: WARNING: 7 of 105 examples were left out as they cannot be read; mend them; the device names their places",
        "device-2: nothing is learned from 2 fields of the data (data.fields)",
        "device-10: 2 of 102 examples were left out as too long (task.max_tokens)",
    ]
    assert counts_in_words([two] * 9)[8:] == ["and 10 more; summary.json has the counts of each device"]


def test_failed_before_the_first_round_closed() -> None:
    events = [*a_run()[:5], {"event": "run_failed", "time": 107.5, "reason": "edge-1 vanished", "kept": "nothing"}]
    summary = summary_of(events)
    assert (summary.state, summary.rounds, summary.seconds) == ("failed", 0, 7.5)
    assert [(d.name, d.examples, d.bytes_up) for d in summary.devices] == [
        ("device-2", 90, None),
        ("device-10", 90, None),
    ]
    assert as_json(summary.hosts) == [
        {"name": "edge-1", "layers": [2, 28], "peak_rss_bytes": None, "bytes_up": None, "bytes_down": None}
    ]


def test_one_closed_round_says_nothing_about_after() -> None:
    summary = summary_of(a_run()[:6])
    assert (summary.state, summary.seconds, summary.rounds) == ("running", 1.0, 1)
    assert [(d.perplexity_before, d.perplexity_after) for d in summary.devices] == [(90.0, None), (80.0, None)]


def test_who_comes_later_has_no_before() -> None:
    events = [round_done(1, [device("a", 9.0)], []), round_done(2, [device("a", 5.0), device("b", 6.0)], [])]
    pairs = {d.name: (d.perplexity_before, d.perplexity_after) for d in summary_of(events).devices}
    assert pairs == {"a": (9.0, 5.0), "b": (None, 6.0)}


def test_layers_are_those_of_the_latest_round() -> None:
    hop = {"node": "edge-2", "first": 2, "last": 28}
    plan = {"event": "plan", "time": 0.0, "round": 1, "routes": [{"device": "a", "hops": [hop]}]}
    rounds = [round_done(1, [], [host("edge-2")]), round_done(2, [], [host("edge-2", layers=[4, 9]), host("edge-3")])]
    hosts = summary_of([plan, *rounds]).hosts
    assert [(each.name, each.layers) for each in hosts] == [("edge-2", (4, 9)), ("edge-3", (2, 28))]


def test_a_planned_host_holds_what_any_route_needs() -> None:
    def plan(*spans: tuple[int, int]) -> dict[str, Any]:
        return {"event": "plan", "routes": [{"hops": [{"node": "pi", "first": a, "last": b}]} for a, b in spans]}

    assert summary_of([plan((0, 9)), plan((2, 27), (1, 4), (4, 28))]).hosts[0].layers == (1, 28)


@pytest.mark.parametrize("lines", [[], [{"event": "run_failed"}], [{"event": "round_done"}]])
def test_missing_pieces(lines: list[dict[str, Any]]) -> None:
    summary = summary_of(lines)
    assert (summary.run, summary.model, summary.devices, summary.hosts, summary.versions) == (None, None, (), (), {})
    Console(file=io.StringIO()).print(summary_table(summary))


def test_what_a_device_did_not_say_is_null() -> None:
    summary = summary_of([{"event": "round_done", "devices": [{"name": "a"}]}])
    (device,) = as_json(summary.devices)
    assert len(device) == 12
    metrics: dict[str, dict] = {"metrics_before": {}, "metrics_after": {}}
    assert device == {**dict.fromkeys(device), "name": "a", **metrics}
    Console(file=io.StringIO()).print(summary_table(summary))


def test_a_summary_of_another_version_can_be_read(tmp_path: Path) -> None:
    file, summary = tmp_path / "summary.json", summary_of(a_run())
    file.write_text(json.dumps(as_json(summary)), encoding="utf-8")
    assert read_summary(file) == summary
    file.write_text('{"run": "demo", "of tomorrow": 1, "devices": [{"name": "a", "bytes_up": 7}]}', encoding="utf-8")
    old = read_summary(file)
    assert (old.run, old.task, old.hosts) == ("demo", None, ())
    assert [(d.name, d.bytes_up, d.metrics_after) for d in old.devices] == [("a", 7, {})]


def test_what_a_private_run_promised_and_spent() -> None:
    privacy = build_summary(as_events([*a_run()[:1], *of_privacy()])).privacy
    assert (privacy.epsilon, privacy.budget, privacy.clipped, privacy.ended_early) == (3.9, 4.0, 0.75, True)
    assert privacy_in_words(privacy) == [
        "privacy: epsilon 3.9 of 4 spent, at delta 1e-05",
        "protects one device, against strangers",
        "covers updates, not losses",
        "noise 2 x the bound 1, which shortened 75 % of the updates and 40 % of the gradients in hosts' steps",
    ]
    table = summary_table(build_summary(as_events([*a_run(), *of_privacy()])))
    assert "epsilon 3.9 of 4 spent" in str(table.caption)
    assert build_summary(as_events(a_run())).privacy is None
    assert "epsilon" not in str(summary_table(build_summary(as_events(a_run()))).caption)


def test_table_fits_a_small_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(summary_of(a_run())))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "demo: done, 2 rounds in 3.8 s" in lines[0]
    assert "device-2: 3 of 99 examples were cut (task.max_tokens)" in map(str.rstrip, lines)
    assert [" ".join(line.split()) for line in lines if line.startswith(("device-", "edge-")) and ":" not in line] == [
        "device-2 90 90.00 -> 15.50 40.0 2.01 kB 6.00 kB 600 B",
        "device-10 90 80.00 -> - 25.0 1.00 kB 2.00 kB 500 B",
        "edge-1 2-27 900 B 1.20 kB 950 B",
    ]


def a_classification() -> list[dict[str, Any]]:
    """Returns one round and the last evaluation; the node `pi-kitchen-north-window` is a device and a host."""
    name = "pi-kitchen-north-window"
    config = {"model": {"name": "minilm"}, "task": {"kind": "classification"}}
    first = [device(name, None, metrics={"accuracy": 0.25}), device("late", None)]
    last = [device(name, None, loss=None, metrics={"accuracy": 0.8125}), device("late", None, loss=None, metrics={})]
    return [
        {"event": "run_started", "time": 1.0, "run": "glosses", "config": config},
        round_done(1, first, [host(name, layers=[2, 10], bytes_up=123_456_789)]),
        round_done(2, last, [host(name, layers=[2, 10])]),
    ]


def test_metrics_of_classification() -> None:
    summary = summary_of(a_classification())
    assert summary.task == "classification"
    found = {d.name: (d.metrics_before, d.metrics_after, d.perplexity_after) for d in summary.devices}
    assert found == {
        "late": ({}, {}, None),
        "pi-kitchen-north-window": ({"accuracy": 0.25}, {"accuracy": 0.8125}, None),
    }
    assert [(h.name, h.layers) for h in summary.hosts] == [("pi-kitchen-north-window", (2, 10))]


def test_table_of_classification_shows_accuracy_and_keeps_its_numbers_whole() -> None:
    summary = summary_of(a_classification())
    large = tuple(replace(each, examples=123_456, tokens_per_s=12_345.6) for each in summary.devices)
    summary = replace(summary, devices=large)
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "accuracy" in text
    assert "perplexity" not in text
    for number in ("25.0 -> 81.2 %", "- -> -", "123,456", "12,345.6", " 2-9 ", "123 MB"):
        assert number in text


def test_names_are_not_markup() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(summary_table(summary_of([round_done(1, [device("[red]x[/nope]", 9.0)], [])])))
    assert "[red]x[/nope]" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (1_234_567, "1.23 MB"),
        (5.4e15, "5400 TB"),
    ],
)
def test_human_bytes(count: float | None, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (7.25, "7.2 s"), (59.96, "1 min 00 s"), (83, "1 min 23 s"), (3725, "1 h 02 min")],
)
def test_human_seconds(seconds: float | None, text: str) -> None:
    assert human_seconds(seconds) == text


def test_a_count_takes_the_right_noun() -> None:
    assert [human_count(count, "device") for count in (0, 1, 2, 1200)] == [
        "0 devices",
        "1 device",
        "2 devices",
        "1,200 devices",
    ]
    assert [human_count(count, "batch", "batches") for count in (1, 2)] == ["1 batch", "2 batches"]


def test_small_helpers() -> None:
    assert (human_measure("accuracy", 1.0), human_measure("perplexity", 15.5)) == ("100.0 %", "15.50")
    assert (human_measure("accuracy", None), human_measure("perplexity", None)) == ("-", "-")
    assert (human_measure("NMSE", 0.05), human_measure("NMSE", 0.0)) == ("-13.01 dB", "-")
    assert (human_number(None), human_number(1234567), human_number(1.256, 2)) == ("-", "1,234,567", "1.26")
    assert (human_layers([2, 28]), human_layers([2, 3])) == ("layers 2-27", "layer 2")
    assert human_layers(None) == "no layers yet"
    assert sorted(["d-10", "d-9", "edge", "d-1"], key=by_name) == ["d-1", "d-9", "d-10", "edge"]


def test_answers_are_summed_up_before_and_after() -> None:
    lines = a_run()
    for line in lines:
        for device in line.get("devices", []):
            device["metrics"] = {"exact_match": 0.5 if line["round"] == 3 else 0.125, "rouge_l": None}
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(summary_of(lines)))
    assert "answers, mean over devices: exact_match 0.125 -> 0.500" in console.file.getvalue()  # type: ignore[attr-defined]
    assert verdict(summary_of(lines)).endswith("Answers, mean over devices: exact_match 0.125 -> 0.500.")


def test_a_result_that_is_not_the_last_adapter_has_the_measures_of_its_own_round() -> None:
    taken = {"event": "best_taken", "time": 103.5, "round": 1, "loss": 3.4, "last_round": 2}
    found = summary_of([*a_run()[:-1], taken, a_run()[-1]])
    assert (found.best_round, found.devices[0].perplexity_after) == (1, 30.0)
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(found))
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "result: the adapter after round 1 of 2, as it had the lowest held-out loss" in said
    assert "Result: the adapter after round 1 of 2, as it had the lowest held-out loss." in verdict(found)
    went_on = summary_of([*a_run()[:-1], taken, {"event": "run_resumed", "time": 104.0, "round": 2}])
    assert (went_on.best_round, went_on.devices[0].perplexity_after) == (None, 15.5)
