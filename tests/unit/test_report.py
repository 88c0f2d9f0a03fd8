from __future__ import annotations

import json
import math
import random
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import UsageError
from edgelam_fl.telemetry.report import write_report
from edgelam_fl.telemetry.split_picture import split_picture
from edgelam_fl.telemetry.summary import build_summary, human_bytes

DEVICES = ("device-1", "device-2", "device-3")
ROUNDS, STEPS = 4, 10


def a_run(*, evil: str = "", lost: bool = False) -> list[dict[str, Any]]:
    """A run's events in the style of the demo; `evil` goes wherever text from outside can stand."""
    draw = random.Random(7)
    config = {
        "model": {"name": f"smollm2-135m{evil}", "base": "fp32"},
        "lora": {"rank": 8, "targets": ["q_proj", evil]},
    }
    names = [f"{name}{evil}" for name in DEVICES]
    routes = [
        {"device": name, "front": 2, "back_first": 28, "num_layers": 30}
        | {"hops": [{"node": f"edge-1{evil}", "first": 2, "last": 28}]}
        for name in names
    ]
    events: list[dict[str, Any]] = [
        {
            "event": "run_started",
            "run": f"demo{evil}",
            "config": config,
            "versions": {"edgelam-fl": "0.1.0", "flwr": "1.41.0"},
        },
        *({"event": "node_joined", "node": name, "role": "device", "examples": 512, "held_out": 57} for name in names),
        {"event": "node_joined", "node": f"edge-1{evil}", "role": "edge"},
        {"event": "node_refused", "node": f"old-pi{evil}", "reason": f"speaks protocol 0, this run speaks 1{evil}"},
    ]
    for number in range(1, ROUNDS + 2):
        active = names[:2] if lost and number > 2 else names
        if lost and number == 3:
            events.append({"event": "node_lost", "round": 3, "node": names[2], "reason": f"silent for 120 s{evil}"})
        events.append({"event": "plan", "round": number, "selected": active, "routes": routes})
        devices = [a_device(name, number, draw, evil) for name in active]
        host = {"name": f"edge-1{evil}", "layers": [2, 28], "bytes_up": 9_100_000, "bytes_down": 9_000_000}
        kinds = (
            {"ACT": 14_100_000, "GRAD": 13_900_000, "TABLE": 900, "STEP_CLOSE": 1_500}
            if number <= ROUNDS
            else {"ACT": 3_000_000}
        )
        events.append(
            {
                "event": "round_done",
                "round": number,
                "seconds": 24.0 + number,
                "devices": devices,
                "bytes_by_kind": kinds,
            }
            | {"hosts": [host | {"peak_rss_bytes": 712_000_000 + number}]}
        )
    events.append({"event": "run_done", "seconds": 131.5, "summary": "summary.json"})
    return [{"time": 1_750_000_000.0 + 12 * i, **event} for i, event in enumerate(events)]


def a_device(name: str, number: int, draw: random.Random, evil: str) -> dict[str, Any]:
    trains = number <= ROUNDS
    start = (number - 1) * STEPS
    losses = [1.2 + 3.2 * math.exp(-(start + s) / 12) + draw.gauss(0, 0.12) for s in range(STEPS if trains else 0)]
    return {
        "name": name,
        "examples": 512,
        "loss": sum(losses) / len(losses) if losses else None,
        "perplexity": 15 + 70 * math.exp(-(number - 1) / 1.1) + draw.random() * 6,
        "tokens": 31_234 if trains else 0,
        "train_seconds": 15.5 + draw.random() if trains else 0.0,
        "eval_seconds": 3.25,
        "bytes_up": 4_700_123 if trains else 500_000,
        "bytes_down": 4_600_321 if trains else 480_000,
        "adapter_bytes_up": 245_760 if trains else 0,
        "adapter_bytes_down": 245_760,
        "peak_rss_bytes": 598_000_000 + number,
        "step_losses": losses,
        "left_out": [{"step": 4, "reason": f"later than 120 s{evil}"}]
        if number == 2 and name.startswith("device-2")
        else [],
    }


def report_of(folder: Path, events: list[dict[str, Any]], *, summary: dict[str, Any] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not (folder / "report.html.part").exists()
    return path.read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


class Page(HTMLParser):
    """The page's tags and texts, without the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "td", "th"):
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
        if self._inside in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    def titles(self) -> list[str]:
        return [attrs["title"] or "" for _, attrs in self.tags if "title" in attrs]


def test_values_are_those_of_summary_json(tmp_path: Path) -> None:
    events = a_run(lost=True)
    summary = build_summary(events)
    summary["devices"][0]["bytes_up"] = 1_234_567  # the file's word counts, not the events'
    page = Page(report_of(tmp_path, events, summary=summary))
    for device in summary["devices"]:
        row = next(row for row in page.rows if row[0] == device["name"])
        before, after = device["perplexity_before"], device["perplexity_after"]
        assert row[1:5] == ["512", f"{before:.2f}", f"{after:.2f}" if after else "-", f"{device['tokens_per_s']:,.1f}"]
        counts = [device[key] for key in ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down")]
        assert row[5:] == [human_bytes(count) for count in (*counts, device["peak_rss_bytes"])]
        assert {f"{count} B" for count in counts} <= set(page.titles())
        assert {str(before), str(device["tokens_per_s"])} <= set(page.titles())
    assert ["device-1", "1.23 MB"] in [[row[0], row[5]] for row in page.rows if len(row) == 10]
    assert ["edge-1", "layers 2-27", "45.5 MB", "45.0 MB", "712 MB"] in page.rows
    assert summary["devices"][2]["perplexity_after"] is None


def test_loss_curve_counts_steps_over_the_run(tmp_path: Path) -> None:
    events = a_run(lost=True)
    loss = figures_of(report_of(tmp_path, events))["loss"]
    assert [line["name"] for line in loss["lines"]] == list(DEVICES)
    assert [line["color"] for line in loss["lines"]] == ["--c0", "--c1", "--c2"]
    assert loss["lines"][0]["x"] == list(range(1, 41))
    assert loss["lines"][2]["x"] == list(range(1, 21))
    rounds = [event for event in events if event["event"] == "round_done"]
    assert loss["lines"][1]["y"][10:20] == rounds[1]["devices"][1]["step_losses"]
    assert loss["marks"] == [10.5, 20.5, 30.5]


def test_perplexity_stands_at_the_rounds_that_came_before(tmp_path: Path) -> None:
    events = a_run()
    line = figures_of(report_of(tmp_path, events))["perplexity"]["lines"][0]
    device = build_summary(events)["devices"][0]
    assert line["x"] == [0, 1, 2, 3, 4]
    assert (line["y"][0], line["y"][-1]) == (device["perplexity_before"], device["perplexity_after"])


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
    assert [bar["y"][0] for bar in seconds] == [slowest, 3.25, pytest.approx(25.0 - slowest - 3.25)]


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    text = report_of(tmp_path, a_run())
    page = Page(text)
    assert text.count("* plotly.js v") == 1
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "action")]
    assert addresses == ["data:,"]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "prefers-color-scheme: dark" in text
    assert "{{" not in page.text


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" '&amp;{{plotly}}"


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    plain, attacked = Page(report_of(tmp_path / "plain", a_run())), report_of(tmp_path / "evil", a_run(evil=EVIL))
    page = Page(attacked)
    assert "<script>alert(1)" not in attacked
    assert [line["name"] for line in figures_of(attacked)["loss"]["lines"]] == [
        escape(name + EVIL, False) for name in DEVICES
    ]
    assert "<img src=x" not in attacked
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert f"demo{EVIL}" in page.text
    assert f"speaks protocol 0, this run speaks 1{EVIL}" in page.text
    assert f"device-1{EVIL}" in [row[0] for row in page.rows]


def test_failed_run(tmp_path: Path) -> None:
    events = a_run(lost=True)[:11]
    events.append(
        {"event": "run_failed", "time": 1_750_000_200.0, "reason": "edge-1 vanished", "kept": "round-2.safetensors"}
    )
    page = Page(report_of(tmp_path, events))
    assert "The run failed" in page.text
    assert "Kept: round-2.safetensors" in page.text
    assert [row for row in page.rows if row[0] == "3 min 20 s"] == [
        ["3 min 20 s", "the run failed", "", "edge-1 vanished"]
    ]
    assert ("span", {"class": "state failed"}) in page.tags


def test_incidents(tmp_path: Path) -> None:
    rows = Page(report_of(tmp_path, a_run(lost=True))).rows
    start = rows.index(["after", "what", "who", "why"])
    assert rows[start + 1 : start + 4] == [
        ["1 min 00 s", "refused", "old-pi", "speaks protocol 0, this run speaks 1"],
        ["1 min 48 s", "left out of round 2, step 4", "device-2", "later than 120 s"],
        ["2 min 00 s", "lost in round 3", "device-3", "silent for 120 s"],
    ]


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
    assert page.text.count("No round is closed yet.") == 4
    assert ("No plan is made yet." in page.text) == (length < 7)
    assert ("span", {"class": "state running"}) in page.tags


def test_half_written_last_line_and_divergence(tmp_path: Path) -> None:
    events = a_run()[:8]
    events[7]["devices"][0]["step_losses"] = [1.0, math.nan, math.inf]
    events[7]["devices"][0]["perplexity"] = math.inf
    report_of(tmp_path, events)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "round_do')
    figures = figures_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert figures["loss"]["lines"][0]["y"] == [1.0, None, None]
    assert figures["perplexity"]["lines"][0]["y"] == [None]


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


def boxes(picture: str) -> list[tuple[int, int, int, str, str]]:
    """(x, y, height, name, text) of every box."""
    shape = r'<rect [^>]* x="(\d+)" y="(\d+)" width="\d+" height="(\d+)"'
    pattern = rf"<g><title>(.*?)</title>{shape}.*?</text><text [^>]*>(.*?)</text></g>"
    return [(int(x), int(y), int(height), name, text) for name, x, y, height, text in re.findall(pattern, picture)]


def test_picture_of_unlike_routes() -> None:
    routes = [
        route("d", hop("edge-1", 2, 28)),
        route("c", front=30, back_first=30),
        route("b", hop("edge-1", 2, 15), hop("edge-2", 15, 28)),
        route("a", hop("edge-1", 2, 15), hop("edge-2", 15, 30), back_first=30),
    ]
    plans = [{"event": "plan", "routes": routes[:1]}, {"event": "plan", "routes": routes}]
    picture = split_picture([*plans, {"event": "plan", "routes": []}], {"a": "--c0", "b": "--c1"})
    assert boxes(picture) == [
        (0, 34, 50, "a", "embedding, layers 0-1"),
        (900, 34, 50, "a", "head, loss"),
        (0, 100, 50, "b", "embedding, layers 0-1"),
        (900, 100, 50, "b", "head, loss, layers 28-29"),
        (0, 166, 50, "c", "embedding, layers 0-29"),
        (900, 166, 50, "c", "head, loss"),
        (0, 232, 50, "d", "embedding, layers 0-1"),
        (900, 232, 50, "d", "head, loss, layers 28-29"),
        (300, 34, 116, "edge-1", "layers 2-14"),
        (300, 232, 50, "edge-1", "layers 2-27"),
        (600, 34, 50, "edge-2", "layers 15-29"),
        (600, 100, 50, "edge-2", "layers 15-27"),
    ]
    assert picture.count('class="way"') == 3 + 3 + 1 + 2
    assert picture.count("text and labels stay here") == 2
    assert picture.count("var(--c1)") == 2
