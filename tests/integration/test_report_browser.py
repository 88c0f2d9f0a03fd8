"""report.html in a real browser: nothing complains, nothing is fetched, and what it shows is what summary.json says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgelam_fl.cli.main import app
from edgelam_fl.telemetry.measures import measure_of
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.summary import before_and_after, build_summary, read_summary
from tests.integration.browser import Tab, chromium, find_chromium
from tests.integration.federation import Run
from tests.recorded import DEVICES, a_classification, a_failed_run, a_run, a_run_failed_at_once, as_events, timeline_of

PROGRAM = find_chromium()
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium on PATH (Debian: apt install chromium)"),
]
BYTES = ("bytes_up", "bytes_down", "adapter_bytes_up", "adapter_bytes_down", "peak_rss_bytes")
TABLE = """[...document.querySelectorAll("table")].filter(t => t.rows[0].cells[0].innerText === "%s").map(t =>
    [...t.rows].slice(1).filter(row => row.cells[0].innerText !== "mean").map(row => [...row.cells].map(c => c.querySelector("[title]")?.title ?? c.innerText)))[0] ?? []"""


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    assert PROGRAM is not None
    with chromium(PROGRAM, tmp_path / "profile") as opened:
        yield opened


def a_good_run() -> list[dict[str, Any]]:
    """With a timeline before the end of each training round."""
    events: list[dict[str, Any]] = []
    for event in a_run(lost=True):
        if event["event"] == "round_done" and event["steps"]:
            events.append({"time": event["time"], **timeline_of(event["round"])})
        events.append(event)
    return events


def page_of(folder: Path, events: list[dict[str, Any]]) -> Path:
    """What `edgelam report` makes of a run's folder."""
    folder.mkdir()
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(as_json(build_summary(as_events(events)))), encoding="utf-8")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert ("\nwhat: " in done.output and "\nkept: " in done.output) == (events[-1]["event"] == "run_failed")
    return folder / "report.html"


def assert_shows_its_summary(tab: Tab, page: Path) -> None:
    """Opens the page; every value of summary.json stands in it, exact where a rounded one is shown."""
    summary = read_summary(page.parent / "summary.json")
    tab.open(page)
    assert (tab.complaints(), tab.requests()) == ([], [page.as_uri()])
    assert tab.ask("document.querySelector('h1').innerText") == summary.run
    assert tab.ask("document.querySelector('.state').innerText") == summary.state
    measure = measure_of(summary.task)
    wanted = []
    for device in summary.devices:
        quality, moved = before_and_after(device, measure), (getattr(device, key) for key in BYTES)
        wanted.append([device.name, *reversed(quality), device.examples, device.tokens_per_s, *moved])
    assert [read(row, 1) for row in tab.ask(TABLE % "device")] == wanted
    hosts = [[host.name, host.bytes_up, host.bytes_down, host.peak_rss_bytes] for host in summary.hosts]
    assert [[row[0], *read(row[1:], 1)[1:]] for row in tab.ask(TABLE % "host")] == hosts
    tiles = tab.ask("[...document.querySelectorAll('.tiles b')].map(b => b.innerText)")
    assert tiles[1:4] == [str(summary.rounds), str(len(summary.devices)), str(len(summary.hosts))]


def figure(tab: Tab, name: str) -> dict[str, Any]:
    """Returns the numbers of a figure, as the page has them."""
    found: dict[str, Any] = json.loads(tab.ask("document.getElementById('figures').textContent"))[name]
    return found


def drawn(tab: Tab, name: str) -> int:
    """Counts the lines that a figure shows."""
    return int(tab.ask(f"document.querySelectorAll('#{name} svg path.line').length"))


def read(cells: list[str], names: int) -> list[Any]:
    """Names as they stand, numbers without their unit, a dash as None."""
    numbers = [None if cell == "-" else float(cell.removesuffix(" B").replace(",", "")) for cell in cells[names:]]
    return [*cells[:names], *numbers]


@pytest.mark.parametrize(
    "events",
    [a_good_run(), a_classification(), a_failed_run(), a_run_failed_at_once()],
    ids=["good", "classification", "failed", "failed at once"],
)
def test_values_are_those_of_summary_json(tab: Tab, tmp_path: Path, events: list[dict[str, Any]]) -> None:
    assert_shows_its_summary(tab, page_of(tmp_path / "run", events))


def test_page_of_a_real_run(tab: Tab, averaged: Run) -> None:
    assert_shows_its_summary(tab, averaged.path / "report.html")
    lines = [line for line in figure(tab, "loss")["lines"] if not (line.get("faint") or line.get("strong"))]
    assert [len(line["y"]) for line in lines] == [2 * 3] * 3


def test_figures_are_drawn_from_the_events(tab: Tab, tmp_path: Path) -> None:
    events = a_good_run()
    tab.open(page_of(tmp_path / "run", events))
    first = next(event for event in events if event["event"] == "round_done")
    lines = {line["name"]: line["y"] for line in figure(tab, "loss")["lines"] if not line.get("faint")}
    steps = {line["name"]: line["y"] for line in figure(tab, "loss")["lines"] if line.get("faint")} or lines
    for i, name in enumerate(DEVICES):
        assert steps[name][:10] == pytest.approx(first["devices"][i]["step_losses"], rel=1e-5)
    assert drawn(tab, "loss") == len(lines) + len(steps)
    stacks = {bar["name"]: bar["y"][0] * 1e6 for bar in figure(tab, "bytes")["bars"]}
    assert stacks["activations"] == pytest.approx(first["bytes_by_kind"]["ACT"])
    assert tab.ask("document.querySelectorAll('#bytes svg rect').length") == sum(
        value > 0 for bar in figure(tab, "bytes")["bars"] for value in bar["y"]
    )


def test_a_legend_switches_a_line_off_and_the_pointer_reads_a_figure(tab: Tab, tmp_path: Path) -> None:
    tab.look(width=1280, height=3000)
    tab.open(page_of(tmp_path / "run", a_good_run()))
    before = drawn(tab, "quality")
    tab.ask("document.querySelector('#quality .legend button').click()")
    assert drawn(tab, "quality") == before - 1
    tab.ask("document.querySelector('#quality .legend button').click()")
    assert drawn(tab, "quality") == before
    line = figure(tab, "quality")["lines"][0]
    place = "(({right, y, height}) => [right - 20, y + height / 2])(document.querySelector('#quality svg').getBoundingClientRect())"
    x, y = tab.ask(place)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.ask("document.querySelector('#quality .tip').innerText")
    assert f"{line['x'][-1]}" in said
    assert line["name"] in said
    assert tab.complaints() == []


def test_timeline_answers_to_the_pointer_the_buttons_and_the_choice_of_a_round(tab: Tab, tmp_path: Path) -> None:
    events = a_good_run()
    tab.look(width=1280, height=3000)
    tab.open(page_of(tmp_path / "run", events))
    told = [event["nodes"] for event in events if event["event"] == "timeline"]
    drawn = "[...document.querySelectorAll('.lane')].map(lane => lane.querySelectorAll('rect').length)"
    assert tab.ask(drawn) == [len(told[-1].get(name, [])) for name in (*DEVICES, "edge-1")]
    choose = "(e => { e.selectedIndex = 0; e.dispatchEvent(new Event('change')) })(document.getElementById('round'))"
    tab.ask(choose)
    shown = "[...document.getElementById('shares').children].map(table => !table.hidden)"
    assert tab.ask(shown) == [i == 0 for i in range(len(told))]

    kind, role, start, seconds, *_ = told[0]["edge-1"][0]
    place = "(({x, y, width, height}) => [x + width / 2, y + height / 2])(document.querySelector('.lane:last-child rect').getBoundingClientRect())"
    x, y = tab.ask(place)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = tab.ask("document.getElementById('said').innerText")
    assert said.startswith(f"edge-1 ({role}): {kind} for device-1, step 1, micro-batch 1")
    assert said.endswith(f"{seconds:.4f} s from {start:.4f} s on")

    box = "document.querySelector('.lane svg').getAttribute('viewBox').split(' ').map(Number)"
    left, _, width, _ = tab.ask(box)
    assert left == 0
    tab.ask("document.getElementById('in').click()")
    assert tab.ask(box) == pytest.approx([width / 4, 0, width / 2, 30])
    for kind, at in (("mousePressed", x), ("mouseMoved", x + 900), ("mouseReleased", x + 900)):
        tab.call("Input.dispatchMouseEvent", type=kind, x=at, y=y, button="left", buttons=1, clickCount=1)
    assert tab.ask(box)[0] == 0, "dragged to its start, and no further"
    tab.ask("document.getElementById('all').click()")
    assert tab.ask(box) == pytest.approx([0, 0, width, 30])
    assert tab.complaints() == []


def test_names_from_outside_do_nothing(tab: Tab, tmp_path: Path) -> None:
    evil = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    names = tuple(f"{name}{evil}" for name in DEVICES)
    events = a_run(evil=evil)
    events.append({"time": 0.0, **timeline_of(1, device_names=names, host_names=(f"edge-1{evil}",))})
    page = page_of(tmp_path / "run", events)
    tab.look(width=1280, height=4000)
    tab.open(page)
    tab.ask("document.querySelectorAll('.lane rect').forEach(box => box.onclick())")
    assert tab.ask("document.title") == f"demo{evil} | EdgeLAM-FL"
    assert tab.ask("document.querySelector('.lane .who').firstElementChild.nextSibling.data") == names[0]
    assert (tab.complaints(), tab.requests()) == ([], [page.as_uri()])


def test_says_why_a_run_failed(tab: Tab, tmp_path: Path) -> None:
    tab.open(page_of(tmp_path / "run", a_failed_run()))
    facts = tab.ask(
        "Object.fromEntries([...document.querySelectorAll('dt')].map(dt => [dt.innerText, dt.nextSibling.innerText]))"
    )
    assert (facts["What"], facts["Where"]) == ("no host is left for layers 2-27", "in round 2")
    assert facts["Lost before"] == "edge-1: silent for 120 s"
    assert facts["Kept"] == "the adapter after round 1 is kept in runs/demo/adapter"
    top = "(e => e.getBoundingClientRect().top)"
    assert tab.ask(f"{top}(document.querySelector('.banner')) < {top}(document.querySelector('.tiles'))")
    assert drawn(tab, "quality") > 1, "what was measured is drawn all the same"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_fits_every_screen_in_light_and_dark(tab: Tab, tmp_path: Path, width: int, scheme: str) -> None:
    tab.look(width=width, scheme=scheme)
    tab.open(page_of(tmp_path / "run", a_classification()))
    assert tab.ask("document.documentElement.scrollWidth") <= width
    brightness = (
        "getComputedStyle(document.querySelector('%s')).%s.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 765"
    )
    background, ink = tab.ask(brightness % ("body", "backgroundColor")), tab.ask(brightness % ("h1", "color"))
    plot = tab.ask(brightness % ("#loss svg text", "fill"))
    assert (background > 0.8 and ink < 0.3) if scheme == "light" else (background < 0.2 and ink > 0.8)
    assert plot < 0.6 if scheme == "light" else plot > 0.5
    assert tab.complaints() == []


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ("<script>console.error('so')</script>", "Runtime.consoleAPICalled"),
        ("<script>undefined.x</script>", "Runtime.exceptionThrown"),
        ("<meta http-equiv=Content-Security-Policy content=\"img-src 'none'\"><img src=there.png>", "Log.entryAdded"),
    ],
)
def test_the_browser_sees_what_would_be_wrong(tab: Tab, tmp_path: Path, body: str, seen: str) -> None:
    (tmp_path / "bad.html").write_text(f"<!doctype html>{body}", encoding="utf-8")
    tab.open(tmp_path / "bad.html")
    assert [event["method"] for event in tab.complaints()] == [seen]


def test_the_browser_sees_what_is_fetched(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'>", encoding="utf-8")
    tab.open(tmp_path / "bad.html")
    assert tab.requests()[1:] == ["http://127.0.0.1:9/x.png"]
