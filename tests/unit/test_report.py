from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from edgelam_fl.errors import DataError, UsageError
from edgelam_fl.telemetry.events import RoundTimeline, as_line, of_kind
from edgelam_fl.telemetry.human import human_bytes
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.report.answers import Answer, write_answers
from edgelam_fl.telemetry.report.figures import (
    BARS_SHOWN,
    LINES_SHOWN,
    POINTS_SHOWN,
    smoothed,
    timeline_figures,
    window_of,
)
from edgelam_fl.telemetry.report.incidents import failure
from edgelam_fl.telemetry.report.over_time import OverTime, write_over_time
from edgelam_fl.telemetry.report.page import write_report
from edgelam_fl.telemetry.report.split_picture import split_picture
from edgelam_fl.telemetry.summary import Summary, build_summary
from edgelam_fl.telemetry.timeline import read_phase
from edgelam_fl.telemetry.verdict import verdict
from tests.recorded import DEVICES, a_classification, a_run, a_run_failed_at_once, as_events, of_privacy, timeline_of


def report_of(folder: Path, events: list[dict[str, Any]], *, summary: Summary | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(as_json(summary)), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not (folder / "report.html.part").exists()
    return path.read_text(encoding="utf-8")


def test_a_table_says_what_is_not_used_of_the_devices_data(tmp_path: Path) -> None:
    events = a_run()
    page = report_of(tmp_path / "whole", events)
    assert "Data not used" not in page
    joined = [event for event in events if event["event"] == "node_joined"]
    joined[1].update(cut=12, bad=3, unread_fields=1, unmeasured=6)
    rows = Page(report_of(tmp_path / "cut", events)).rows
    at = rows.index(["device", "learned", "measured", "not measured", "cut", "too long", "unreadable", "unused fields"])
    assert rows[at + 1][1:] == ["512", "57", "6", "12", "0", "3", "1"]
    assert joined[1]["node"] in rows[at + 1][0]


def figures_of(page: str, name: str = "figures") -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


class Page(HTMLParser):
    """The page's tags and texts, without the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.terms: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "td", "th", "dt", "dd"):
            self._inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data
        if self._inside in ("dt", "dd"):
            self.terms.append(data)
        if self._inside in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    def definitions(self) -> dict[str, str]:
        return dict(zip(self.terms[::2], self.terms[1::2], strict=True))

    def hidden(self) -> set[str | None]:
        """Returns the parts of the page that are not shown."""
        return {
            attrs.get("id") or attrs.get("class") for tag, attrs in self.tags if "hidden" in attrs and len(attrs) > 1
        }

    def titles(self) -> list[str]:
        return [attrs["title"] or "" for _, attrs in self.tags if "title" in attrs]


def test_values_are_those_of_summary_json(tmp_path: Path) -> None:
    events = a_run(lost=True)
    summary = build_summary(as_events(events))
    first, *others = summary.devices
    changed = replace(first, bytes_up=1_234_567)  # what the file says counts, not what the events say
    summary = replace(summary, devices=(changed, *others))
    page = Page(report_of(tmp_path, events, summary=summary))
    assert len(summary.devices) == 3
    for device in summary.devices:
        row = next(row for row in page.rows if row[0] == device.name)
        before, after = device.perplexity_before, device.perplexity_after
        assert row[1:5] == [f"{after:.2f}" if after else "-", f"{before:.2f}", "512", f"{device.tokens_per_s:,.1f}"]
        counts = [device.bytes_up, device.bytes_down, device.adapter_bytes_up, device.adapter_bytes_down]
        assert row[5:] == [human_bytes(count) for count in (*counts, device.peak_rss_bytes)]
        assert {f"{count} B" for count in counts} <= set(page.titles())
        assert {str(before), str(device.tokens_per_s)} <= set(page.titles())
    assert ["device-1", "1.23 MB"] in [[row[0], row[5]] for row in page.rows if len(row) == 10]
    assert ["edge-1", "layers 2-27", "45.5 MB", "45.0 MB", "712 MB"] in page.rows
    assert summary.devices[2].perplexity_after is None


def lines_of(figure: dict[str, Any], *, faint: bool = False) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in figure["lines"] if line.get("faint", False) == faint}


def test_loss_curve_counts_steps_over_the_run(tmp_path: Path) -> None:
    events = a_run(lost=True)
    loss = figures_of(report_of(tmp_path, events))["loss"]
    steps = lines_of(loss, faint=True)
    assert list(steps) == list(DEVICES)
    assert [line["color"] for line in steps.values()] == ["--c0", "--c1", "--c2"]
    assert steps[DEVICES[0]]["x"] == list(range(1, 41))
    assert steps[DEVICES[2]]["x"] == list(range(1, 21))
    rounds = [event for event in events if event["event"] == "round_done"]
    assert steps[DEVICES[1]]["y"][10:20] == pytest.approx(rounds[1]["devices"][1]["step_losses"], rel=1e-5)
    assert loss["marks"] == [10.5, 20.5, 30.5]


def test_losses_are_smoothed_and_averaged_over_devices(tmp_path: Path) -> None:
    events = a_run()
    page = report_of(tmp_path, events)
    loss = figures_of(page)["loss"]
    own = [device["step_losses"] for event in events if event["event"] == "round_done" for device in event["devices"]]
    steps = [list(chain(*own[number::3])) for number in range(3)]
    smooth = lines_of(loss)
    assert list(smooth) == [*DEVICES, "mean over devices"]
    window = window_of(40)
    assert f"Each point is the mean of {window} steps; faint: each step." in Page(page).text
    assert smooth[DEVICES[0]]["y"][20] == pytest.approx(
        sum(steps[0][20 - window // 2 : 21 + window // 2]) / window, 1e-5
    )
    assert smooth[DEVICES[0]]["y"][0] == pytest.approx(sum(steps[0][: 1 + window // 2]) / (1 + window // 2), rel=1e-5)
    means = [smooth[name]["y"][20] for name in DEVICES]
    assert smooth["mean over devices"]["y"][20] == pytest.approx(sum(means) / 3, rel=1e-5)


def test_smoothing_leaves_out_what_is_no_number() -> None:
    assert smoothed([1.0, None, 4.0, math.nan, 10.0], 3) == [1.0, None, 4.0, None, 10.0]
    assert smoothed([1.0, 2.0, 6.0], 1) == [1.0, 2.0, 6.0]


def test_of_many_devices_the_mean_and_its_spread_are_drawn(tmp_path: Path) -> None:
    events = a_run()
    for event in events:
        if event["event"] == "round_done":
            device = event["devices"][0]
            event["devices"] = [{**device, "name": f"d{n}", "perplexity": 10.0 + n} for n in range(LINES_SHOWN + 1)]
    figures = figures_of(report_of(tmp_path, events))
    (line,) = figures["quality"]["lines"]
    mean, spread = 10 + LINES_SHOWN / 2, stdev(range(LINES_SHOWN + 1))
    assert (line["name"], line["y"]) == ("mean over devices", [mean] * 5)
    assert (line["low"][0], line["high"][0]) == pytest.approx((mean - spread, mean + spread), rel=1e-5)
    assert len(figures["loss"]["lines"]) == 1


def test_a_long_run_of_many_devices_is_a_small_page(tmp_path: Path) -> None:
    """Of rounds, steps, devices and timelines there are more than are drawn one by one."""
    events = a_run()
    (first,) = (event for event in events if event["event"] == "round_done" and event["round"] == 1)
    losses = [3.123456789 + 0.01 * step for step in range(20)]
    devices = [{**first["devices"][0], "name": f"device-{n}", "step_losses": losses} for n in range(12)]
    rounds = [{**first, "round": number, "devices": devices} for number in range(1, 301)]
    (phase,) = of_kind(as_events([timeline_of(1)]), RoundTimeline)
    timelines = [as_line(replace(phase, round=number)) for number in range(1, 51)]
    text = report_of(tmp_path, [*events[:6], *rounds, *timelines, {"event": "run_done"}])
    assert len(text.encode()) < 2_000_000
    figures = figures_of(text)
    assert len(figures["seconds"]["bars"][0]["x"]) <= 100
    assert figures["seconds"]["bars"][0]["x"][:2] == ["1-3", "4-6"]
    assert sum(len(line["x"]) for line in figures["loss"]["lines"]) <= POINTS_SHOWN + 2_000


def test_perplexity_stands_at_the_rounds_that_came_before(tmp_path: Path) -> None:
    events = a_run()
    lines = lines_of(figures_of(report_of(tmp_path, events))["quality"])
    devices = build_summary(as_events(events)).devices
    line, mean = lines[DEVICES[0]], lines["mean over devices"]
    assert line["x"] == mean["x"] == [0, 1, 2, 3, 4]
    held_out = [devices[0].perplexity_before, devices[0].perplexity_after]
    assert [line["y"][0], line["y"][-1]] == pytest.approx(held_out, rel=1e-5)
    after = [device.perplexity_after for device in devices]
    assert mean["y"][-1] == pytest.approx(sum(after) / 3, rel=1e-5)
    assert mean["high"][-1] - mean["y"][-1] == pytest.approx(stdev(after), rel=1e-3)


def test_bars_stack_bytes_and_seconds(tmp_path: Path) -> None:
    events = a_run()
    figures = figures_of(report_of(tmp_path, events))
    stacks = {bar["name"]: bar["y"] for bar in figures["bytes"]["bars"]}
    assert figures["bytes"]["bars"][0]["x"] == ["1", "2", "3", "4", "evaluation"]
    assert {kind: values[0] for kind, values in stacks.items()} == {
        "activations": pytest.approx(14.1),
        "gradients": pytest.approx(13.9),
        "adapters": pytest.approx(3 * 2 * 245_760 / 1e6),
        "control": pytest.approx((900 + 1_500) / 1e6),
    }
    seconds = figures["seconds"]["bars"]
    assert [bar["name"] for bar in seconds] == ["training", "evaluation", "the rest"]
    slowest = max(device["train_seconds"] for device in events[7]["devices"])
    assert [bar["y"][0] for bar in seconds] == pytest.approx([slowest, 3.25, 25.0 - slowest - 3.25], rel=1e-5)


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    text = report_of(tmp_path, a_run())
    page = Page(text)
    assert len(text.encode()) < 100_000
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "action")]
    assert addresses == ["data:,"]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "prefers-color-scheme: dark" in text
    assert "{{" not in page.text


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" '&amp;{{figures}}"


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    evil_names = tuple(f"{name}{EVIL}" for name in DEVICES)
    plain = Page(report_of(tmp_path / "plain", [*a_run(), timeline_of(1)]))
    attacked = report_of(tmp_path / "evil", [*a_run(evil=EVIL), timeline_of(1, device_names=evil_names)])
    page = Page(attacked)
    assert "<script>alert(1)" not in attacked
    assert list(lines_of(figures_of(attacked)["loss"], faint=True)) == [name + EVIL for name in DEVICES]
    assert "<img src=x" not in attacked
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert f"demo{EVIL}" in page.text
    assert f"speaks protocol 0, this run speaks 1{EVIL}" in page.text
    assert f"device-1{EVIL}" in [row[0] for row in page.rows]


def test_failed_run(tmp_path: Path) -> None:
    events = a_run(lost=True)[:12]
    events.append(
        {"event": "run_failed", "time": 1_750_000_200.0, "reason": "edge-1 vanished", "kept": "round-2.safetensors"}
    )
    page = Page(report_of(tmp_path, events))
    assert "The run failed" in page.text
    assert page.definitions() == {
        "What": "edge-1 vanished",
        "Where": "in round 3",
        "Lost before": "device-3: silent for 120 s",
        "When": "2025-06-15 15:10:00 UTC, 3 min 20 s after the start",
        "Kept": "round-2.safetensors",
    }
    assert page.hidden() == {"timeline"}
    assert [row for row in page.rows if row[0] == "3 min 20 s"] == [
        ["3 min 20 s", "the run failed", "", "edge-1 vanished"]
    ]
    assert ("span", {"class": "state failed"}) in page.tags


def test_run_that_failed_before_its_first_round(tmp_path: Path) -> None:
    text = report_of(tmp_path, a_run_failed_at_once())
    page = Page(text)
    assert (figures_of(text), figures_of(text, "timelines")) == ({}, [])
    assert page.text.count("No round was closed, so there are no figures.") == 1
    assert page.definitions()["Where"] == "before the first round; device-1, device-2 had joined"
    assert page.definitions()["Kept"] == "no round was finished"
    assert [row[0] for row in page.rows][:3] == ["device", "device-1", "device-2"]


def test_where_a_run_failed() -> None:
    def where(*events: dict[str, Any]) -> str:
        return dict(failure(as_events(events)))["Where"]

    started = {"event": "run_started", "config": {"federation": {"rounds": 2}}}
    plans = [{"event": "plan", "round": number} for number in (1, 2, 3)]
    failed = {"event": "run_failed", "reason": "no disk"}
    assert where(failed) == "before the first round; no node had joined"
    assert where(started, plans[0], failed) == "in round 1 of 2"
    assert where(started, plans[0], {**failed, "node": "edge-1", "round": 2}) == "in round 2 of 2, at edge-1"
    assert where(started, plans[1], {"event": "round_done", "round": 2}, failed) == "after round 2 of 2"
    assert where(started, *plans, failed) == "in the evaluation after the last round"
    assert failure(as_events([started, *plans])) == []


def test_only_a_few_of_many_lost_nodes_stand_at_the_top() -> None:
    lost = [{"event": "node_lost", "round": 1, "node": f"n{i}", "reason": "silent"} for i in range(8)]
    lines: list[dict] = [{"event": "plan", "round": 1}, *lost, {"event": "run_failed", "reason": "all lost"}]
    facts = dict(failure(as_events(lines)))
    assert facts["Lost before"].splitlines() == [*(f"n{i}: silent" for i in range(5)), "and 3 more, below"]


def test_classification_shows_accuracy(tmp_path: Path) -> None:
    events = a_classification()
    text = report_of(tmp_path, events)
    page, device = Page(text), build_summary(as_events(events)).devices[0]
    quality = figures_of(text)["quality"]
    assert (quality["y"], quality["share"]) == ("accuracy", True)
    values = [device.metrics_before["accuracy"], device.metrics_after["accuracy"]]
    assert [quality["lines"][0]["y"][0], quality["lines"][0]["y"][-1]] == pytest.approx(values, rel=1e-5)
    row = next(row for row in page.rows if row[0] == device.name)
    assert row[2:0:-1] == [f"{100 * (value or 0):.1f} %" for value in values]
    assert {str(value) for value in values} <= set(page.titles())
    assert "Held-out accuracy" in page.text
    assert "perplexity" not in page.text


@pytest.mark.parametrize(
    ("task", "measure", "better", "ends"),
    [
        ("beamforming", "sum rate, bit/s/Hz", "higher", (2.0, 5.0)),
        ("channel-prediction", "NMSE, dB", "lower", (3.0103, 6.9897)),
    ],
)
def test_a_measure_at_places_is_drawn_over_them_beside_the_methods_that_it_is_compared_with(
    tmp_path: Path, task: str, measure: str, better: str, ends: tuple[float, float]
) -> None:
    events = a_run()
    events[0]["config"]["task"] = {"kind": task}
    for plan in (event for event in events if event["event"] == "plan"):
        plan["routes"] = [
            {**route, "front": 0, "back_first": 0, "num_layers": 0, "hops": []} for route in plan["routes"]
        ]
    done = [event for event in events if event["event"] == "round_done"]
    for number, event in enumerate(done):
        for at, device in enumerate(event["devices"]):
            values = {"": 2.0 + 0.75 * number, "RZF": 4.0}
            device["points"] = [[who, snr, value, 1 + at] for snr in (0, 10) for who, value in values.items()]
            device |= {"perplexity": None, "metrics": {measure.partition(",")[0]: values[""]}}
    done[-1]["devices"][0]["points"] += [["", 20, 8.0, 4], ["ZF", 10, 9.0, 1]]  # not measured on the other devices
    page = report_of(tmp_path, events)
    figure = figures_of(page)["points"]
    lines = {line["name"]: (line["x"], line["y"]) for line in figure["lines"]}
    assert (figure["y"], list(lines)) == (measure, ["RZF", "before training", "trained model"])
    assert lines["before training"] == ([0, 10], [ends[0]] * 2)
    assert lines["trained model"][0] == [0, 10, 20]
    assert lines["trained model"][1][:2] == [ends[1]] * 2
    assert f"the same for all; {better} is better." in page
    assert "perplexity" not in Page(page).text
    assert "a network without layers to cut" in page
    assert "--to merged" not in page


def test_timeline_of_every_round_with_its_shares(tmp_path: Path) -> None:
    events = a_classification()
    text = report_of(tmp_path, events)
    timelines, told = figures_of(text, "timelines"), list(of_kind(as_events(events), RoundTimeline))
    assert [each["round"] for each in timelines] == [1, 2, 3]
    assert [(row["node"], row["role"]) for row in timelines[0]["rows"]] == [
        *((name, "device") for name in ("ann", "bob", "cat", "pi-kitchen-north", "pi-office")),
        *((name, "host") for name in ("edge-1", "pi-kitchen-north", "pi-office")),
    ]
    assert {(row["node"], row["color"]) for row in timelines[0]["rows"]} >= {("ann", "--c0"), ("edge-1", "--muted")}
    kind, _, *rest = told[2].nodes["ann"][0]
    assert timelines[2]["rows"][0]["bars"][0] == [kind, *rest]
    page = Page(text)
    starts = [i for i, row in enumerate(page.rows) if row == ["node", "computed", "sent", "waited"]]
    assert len(starts) == len(told)
    for i, event in zip(starts, told, strict=True):
        phase = read_phase(event)
        assert phase is not None
        found = phase.shares()
        assert len(found) == 6
        for row, (name, shares) in zip(page.rows[i + 1 : i + 1 + len(found)], found.items(), strict=True):
            parts = (shares.computed_s, shares.sent_s, shares.waited_s)
            assert row == [name, *(f"{100 * part / phase.end_s:.0f} %" for part in parts)]
            assert {f"{part:.4f}".rstrip("0").rstrip(".") for part in parts} <= {
                t.removesuffix(" s") for t in page.titles()
            }


def a_timeline() -> RoundTimeline:
    (timeline,) = of_kind(as_events([timeline_of(1)]), RoundTimeline)
    return timeline


def test_only_the_newest_timelines_are_kept_where_they_are_many() -> None:
    phase = read_phase(a_timeline())
    assert phase is not None
    count = sum(map(len, phase.rows.values()))
    fit = BARS_SHOWN // count
    phases = [replace(phase, round=number) for number in range(1, fit + 3)]
    assert [each["round"] for each in timeline_figures(phases, {})] == list(range(3, fit + 3))
    huge = replace(phase, rows={key: own * (fit + 1) for key, own in phase.rows.items()})
    assert len(timeline_figures([phase, huge], {})) == 1


def test_incidents(tmp_path: Path) -> None:
    rows = Page(report_of(tmp_path, a_run(lost=True))).rows
    start = rows.index(["after", "what", "who", "why"])
    assert rows[start + 1 : start + 4] == [
        ["1 min 00 s", "refused", "old-pi", "speaks protocol 0, this run speaks 1"],
        ["1 min 48 s", "left out of round 2, step 5", "device-2", "later than 120 s"],
        ["2 min 00 s", "lost in round 3", "device-3", "silent for 120 s"],
    ]


def test_the_time_that_a_run_waited_for_another_is_none_of_its_own(tmp_path: Path) -> None:
    run = a_run()
    began = run[0]["time"]
    for number, event in enumerate(waits := [{"event": "run_waits", "run": "a", "nodes": ["e"], "runs_ahead": 1}] * 2):
        run.insert(number, {**event, "time": began - 20 + 10 * number, "seconds": 10.0 * number})
    rows = Page(report_of(tmp_path, run)).rows
    assert ["", "waited 10.0 s for its turn", "", "waits for run a, which uses e"] in rows
    events = as_events(run)
    assert build_summary(events).seconds == build_summary(events[len(waits) :]).seconds


def test_what_a_private_run_promised_and_spent(tmp_path: Path) -> None:
    page = Page(report_of(tmp_path, [*a_run(), *of_privacy()]))
    start = page.rows.index(["what", "value"])
    assert page.rows[start + 1 : start + 10] == [
        ["epsilon", "3.9 of 4 spent; the run ended early, as another round would have spent more"],
        ["delta", "1e-05"],
        ["unit", "one device"],
        ["adversary", "strangers"],
        ["messages covered", "updates"],
        ["not covered", "losses"],
        ["noise", "2 times the bound (privacy.mode = 'central')"],
        ["bound", "an L2 norm of 1"],
        [
            "clipped",
            "75 % of the updates and 40 % of the gradients in hosts' steps; exact, and so for the server's operator alone",
        ],
    ]
    why = "epsilon 3.9 of 4 is spent, and another round would exceed it"
    assert ["the run ended after round 3 of 4", "", why] in [row[1:] for row in page.rows]
    assert ["what", "value"] not in Page(report_of(tmp_path / "other", a_run())).rows


def test_many_incidents_are_cut(tmp_path: Path) -> None:
    many = [{"event": "node_refused", "time": float(i), "node": f"n{i}", "reason": "no"} for i in range(203)]
    page = Page(report_of(tmp_path, many))
    assert sum(row[1:2] == ["refused"] for row in page.rows) == 200
    assert "and 3 more in events.jsonl" in page.text


@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_run_that_has_just_begun(tmp_path: Path, length: int) -> None:
    text = report_of(tmp_path, a_run()[:length])
    page = Page(text)
    assert figures_of(text) == {}
    assert page.text.count("No round is closed yet.") == 1
    assert page.hidden() == {"pair", "timeline"}
    assert "The run failed" not in page.text
    assert ("No plan was made." in page.text) == (length < 7)
    assert ("span", {"class": f"state {'running' if length else 'never-begun'}"}) in page.tags


def test_half_written_last_line_and_divergence(tmp_path: Path) -> None:
    events = a_run()[:8]
    events[7]["devices"][0]["step_losses"] = [1.0, math.nan, math.inf]
    events[7]["devices"][0]["perplexity"] = math.inf
    report_of(tmp_path, events)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "round_do')
    figures = figures_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert lines_of(figures["loss"])[DEVICES[0]]["y"] == [1, None, None]
    assert lines_of(figures["quality"])[DEVICES[0]]["y"] == [None]


def test_settings_are_listed_with_their_paths(tmp_path: Path) -> None:
    rows = Page(report_of(tmp_path, a_run())).rows
    assert ["model.base", '"fp32"'] in rows
    assert ["lora.targets", '["q_proj", ""]'] in rows


def test_folder_without_events(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no events\.jsonl"):
        write_report(tmp_path)


def hop(node: str, first: int, last: int) -> dict[str, Any]:
    return {"node": node, "first": first, "last": last}


def route(device: str, *hops: dict[str, Any], front: int = 2, back_first: int = 28) -> dict[str, Any]:
    return {"device": device, "front": front, "back_first": back_first, "num_layers": 30, "hops": list(hops)}


def boxes(picture: str) -> list[tuple[str, str, str]]:
    """Returns (class, name, text) of every box."""
    return re.findall(
        r'<g class="(\w+)"[^>]*>.*?<text class="name"[^>]*>(.*?)</text><text [^>]*>(.*?)</text></g>', picture
    )


def sides(picture: str, *texts: str) -> list[tuple[int, int]]:
    """Returns (left, right) of the rectangles with these texts."""
    pattern = (
        r'<rect class="box" x="(\d+)" y="\d+" width="(\d+)" [^>]*/><text [^>]*>[^<]*</text><text [^>]*>(.*?)</text>'
    )
    found = {text: (int(x), int(x) + int(width)) for x, width, text in re.findall(pattern, picture)}
    return [found[text] for text in texts]


def test_picture_of_unlike_routes() -> None:
    routes = [
        route("d", hop("edge-1", 2, 28)),
        route("c", front=30, back_first=30),
        route("b", hop("edge-1", 2, 15), hop("edge-2", 15, 28)),
        route("a", hop("edge-1", 2, 15), hop("edge-2", 15, 30), back_first=30),
    ]
    plans = [{"event": "plan", "routes": routes[:1]}, {"event": "plan", "routes": routes}]
    events = as_events([*plans, {"event": "plan", "routes": []}])
    picture = split_picture(events, {"a": "--c0", "b": "--c1"})
    ends = [
        ("own", "c", "the whole model, layers 0-29"),
        *(("own", "d", text) for text in ("embedding, layers 0-1", "head, loss, layers 28-29")),
        *(("own", "a", text) for text in ("embedding, layers 0-1", "head, loss")),
        *(("own", "b", text) for text in ("embedding, layers 0-1", "head, loss, layers 28-29")),
    ]
    # d leaves edge-1 later than a and b do, and a leaves edge-2 later than b: two staircases
    hosts = [("host", "edge-1", "layers 2-27"), ("host", "edge-2", "layers 15-29")]
    assert boxes(picture) == [*ends, *hosts]
    assert picture.count('<path class="box"') == 2
    assert picture.count('class="way"') == 0 + 2 + 3 + 3
    assert picture.count("var(--c1)") == 2


def test_picture_of_unlike_cuts_keeps_the_layers_in_order() -> None:
    fronts = (1, 4)
    routes = [route(f"d{front}", hop("edge-1", front, 28), front=front) for front in fronts]
    (left_1, right_1), (left_4, right_4) = sides(
        split_picture(as_events([{"event": "plan", "routes": routes}]), {}),
        "embedding, layer 0",
        "embedding, layers 0-3",
    )
    assert left_1 == left_4
    assert right_1 < right_4


def test_picture_of_a_device_that_hosts_for_itself_and_another() -> None:
    routes = [route(name, hop("pi", 2, 28)) for name in ("ann", "pi")]
    picture = split_picture(as_events([{"event": "plan", "routes": routes}]), {"ann": "--c0", "pi": "--c1"})
    assert [name for kind, name, _ in boxes(picture) if kind == "host"] == ["pi"]
    assert picture.count('<g class="host" style="color: var(--c1)">') == 1


def test_picture_and_words_where_the_last_host_sees_the_labels(tmp_path: Path) -> None:
    routes = [route(name, hop("edge-1", 2, 15), hop("edge-2", 15, 30), back_first=30) for name in ("a", "b")]
    config = {"split": {"labels": "last-stage"}}
    events: list[dict] = [{"event": "run_started", "config": config}, {"event": "plan", "round": 1, "routes": routes}]
    picture = split_picture(as_events(events), {})
    assert boxes(picture) == [
        *(("own", name, "embedding, layers 0-1") for name in ("a", "b")),
        ("host", "edge-1", "layers 2-14"),
        ("host", "edge-2", "layers 15-29, head, loss"),
    ]
    assert picture.count('class="way"') == 2 * 2
    assert (
        "where the bytes of its text stay; labels go to the last host."
        in Page(report_of(tmp_path / "last", events)).text
    )
    events[0]["config"] = {"split": {"labels": "device"}}
    assert "where the bytes of its text and labels stay." in Page(report_of(tmp_path / "device", events)).text


def verdict_of(*pairs: tuple[float | None, float | None], state: str = "done", task: str = "causal-lm") -> str:
    """Returns the sentence about devices with these values before and after."""
    summary = build_summary(as_events(a_run()), state)
    device, measure = summary.devices[0], "perplexity" if task == "causal-lm" else "metrics"
    keys = (f"{measure}_before", f"{measure}_after")
    devices = []
    for number, pair in enumerate(pairs, 1):
        values: Any = pair if task == "causal-lm" else map(as_accuracy, pair)
        changes: dict[str, Any] = dict(zip(keys, values, strict=True))
        devices.append(replace(device, name=f"d{number}", **changes))
    return verdict(replace(summary, devices=tuple(devices), task=task))


def as_accuracy(value: float | None) -> Any:
    return {} if value is None else {"accuracy": value}


def test_the_verdict_is_one_sentence_about_the_result() -> None:
    assert verdict_of((48.9, 11.8)) == "Held-out perplexity fell from 48.90 to 11.80."
    assert verdict_of((48.0, 10.0), (52.0, 20.0)) == (
        "Held-out perplexity fell from 50.00 to 15.00, as a mean over 2 devices (10.00 to 20.00 at the end). It improved on every device."
    )
    assert verdict_of((0.25, 0.75), task="classification") == "Held-out accuracy rose from 25.0 % to 75.0 %."
    assert verdict_of((8.0, 10.0), (9.0, 8.0)) == (
        "Held-out perplexity rose from 8.50 to 9.00, as a mean over 2 devices (8.00 to 10.00 at the end). That is worse than what the run "
        "began with. It improved on 1 of 2 devices, not on d1."
    )
    assert verdict_of((9.0, 8.0), (None, 5.0)) == "Held-out perplexity fell from 9.00 to 8.00."
    assert verdict_of((9.0, 9.0)) == "Held-out perplexity stayed at 9.00."


def test_the_verdict_of_a_run_that_has_not_ended_well() -> None:
    assert verdict_of((9.0, 8.0), state="running") == "So far, held-out perplexity fell from 9.00 to 8.00."
    assert verdict_of((9.0, 8.0), state="stopped").startswith("Before the run ended early, held-out perplexity fell")
    assert verdict_of((9.0, None), state="running") == (
        "Held-out perplexity was 9.00 before training; nothing is measured after it yet."
    )
    assert verdict_of((9.0, math.inf)).endswith("nothing could be measured after it.")
    assert verdict_of((None, None), state="running") == "Nothing is measured yet."
    assert verdict_of((None, None)) == "Nothing was measured: it is not known what the run has changed."


def test_the_page_says_how_it_went_and_what_to_type_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    events = a_run()
    events[0]["config"]["task"] = {"kind": "causal-lm"}
    page = Page(report_of(tmp_path / "my runs" / "mine", events))
    assert "Held-out perplexity fell from" in page.text
    for command in ("chat", "export", "compare"):
        assert f"edgelam {command} ~'/my runs/mine'" in page.text
    values = [device.perplexity_after for device in build_summary(as_events(events)).devices]
    mean = next(row for row in page.rows if row[0] == "mean")
    assert mean[1] == f"{sum(values) / 3:.2f} ± {stdev(values):.2f}"
    failed = [*events[:-2], {"event": "run_failed", "reason": "no", "kept": "all"}]
    assert "edgelam run --resume" in Page(report_of(tmp_path / "failed", failed)).text
    assert "edgelam top" in Page(report_of(tmp_path / "running", events[:-2])).text


def test_a_channel_over_time_is_drawn_if_somebody_put_it_there(tmp_path: Path) -> None:
    assert "over_time" not in figures_of(report_of(tmp_path, a_run()))
    shown = OverTime(speed_kmh=30.0, true=(1.0, 0.5, 0.25), heard=(1.1, 0.4), before=(0.4,), after=(0.3,))
    write_over_time(tmp_path, shown)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    lines = {line["name"]: (line["x"], line["y"]) for line in figures_of(page)["over_time"]["lines"]}
    assert lines == {
        "true channel": ([-1, 0, 1], [1, 0.5, 0.25]),
        "heard, with noise": ([-1, 0], [1.1, 0.4]),
        "before training": ([1], [0.4]),
        "trained model": ([1], [0.3]),
    }
    assert "of a user at 30 km/h" in Page(page).text
    (tmp_path / "over_time.json").write_text("[1")
    with pytest.raises(DataError, match="the file is damaged; remove it"):
        write_report(tmp_path)


def test_answers_before_and_after_are_shown_if_somebody_asked(tmp_path: Path) -> None:
    assert "Answers" not in Page(report_of(tmp_path, a_run())).text
    write_answers(tmp_path, [Answer(question="What does abs do?", before="No idea.", after="An older answer.")])
    write_answers(
        tmp_path,
        [
            Answer(question="What does abs do?", before="It is <b>.", after=f"The absolute value. {EVIL}"),
            Answer(question="And len?", before="?", after="The length.", truth="Return the number of items."),
        ],
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.terms == [
        *("What does abs do?", "before", "It is <b>.", "after", f"The absolute value. {EVIL}"),
        *("And len?", "before", "?", "after", "The length.", "truth", "Return the number of items."),
    ]
    (tmp_path / "answers.json").write_text("[1")
    with pytest.raises(DataError, match="the file is damaged; remove it"):
        write_report(tmp_path)
