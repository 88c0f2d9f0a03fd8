"""RUN/report.html: one page without network access that shows a run, also one that goes on or failed.

Reads the run's folder and nothing else: events.jsonl, and summary.json where the run has written it (its values are the
ones shown). What comes from events is escaped; the page's own policy forbids it to load anything. `report_page.html`
holds the looks: here a colour is the name of one of its CSS variables, light or dark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from edgelam_fl.errors import UsageError
from edgelam_fl.telemetry.events import read_events
from edgelam_fl.telemetry.split_picture import split_picture
from edgelam_fl.telemetry.summary import (
    ADAPTER_BYTES,
    LINK_BYTES,
    Event,
    build_summary,
    human_bytes,
    human_layers,
    human_number,
    human_seconds,
    is_training_round,
    of_kind,
    total,
)

TEMPLATE = Path(__file__).with_name("report_page.html")
FRAMES = {"ACT": "activations", "GRAD": "gradients"}  # every other kind of frame counts as control
INCIDENTS_SHOWN = 200
NO_ROUND = "<p>No round is closed yet.</p>"
DEVICE_HEADINGS = (
    "device|examples|perplexity before|perplexity after|tokens/s|"
    "sent|received|adapters sent|adapters received|peak memory"
)


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html (about 5 MB, plotly.js inside) in one move and returns its path.

    Raises UsageError where there are no events.
    """
    source, written, unfinished = (run_dir / name for name in ("events.jsonl", "summary.json", "report.html.part"))
    if not source.is_file():
        raise UsageError(f"{run_dir} is no run's folder: it holds no events.jsonl")
    events = list(read_events(source))
    summary = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else build_summary(events)
    unfinished.write_text(report_page(events, summary), encoding="utf-8")
    return unfinished.replace(run_dir / "report.html")


def report_page(events: list[dict[str, Any]], summary: Mapping[str, Any]) -> str:
    """The page's text."""
    started = next(of_kind(events, "run_started"), {})
    rounds = list(of_kind(events, "round_done"))
    colours = {device["name"]: f"--c{i % 8}" for i, device in enumerate(summary["devices"])}
    figures = {
        "loss": _loss_figure(rounds, colours),
        "perplexity": _perplexity_figure(rounds, colours),
        "bytes": _bytes_figure(rounds),
        "seconds": _seconds_figure(rounds),
    }
    parts = {
        "name": escape(str(summary["run"] or "unnamed run")),
        "state": escape(summary["state"]),
        "subtitle": escape(f"{summary['model']} | {', '.join(f'{k} {v}' for k, v in summary['versions'].items())}"),
        "banner": "".join(map(_banner, of_kind(events, "run_failed"))),
        "tiles": "".join(f'<div class="card muted">{what}<b>{value}</b></div>' for what, value in _tiles(summary)),
        "devices": _device_table(summary["devices"], colours),
        "hosts": _host_table(summary["hosts"]),
        "split": split_picture(events, colours),
        "incidents": _incident_table(events),
        "settings": _table("", "key|value", _settings(started.get("config") or {}), "words"),
        "plotly": get_plotlyjs(),
        "figures": json.dumps(_finite(figures if rounds else {})).replace("<", "\\u003c"),
        **{key: f'<div class="plot" id="{key}"></div>' if rounds else NO_ROUND for key in figures},
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _loss_figure(rounds: list[Event], colours: Mapping[str, str]) -> dict[str, Any]:
    """Loss a device over the run's steps, counted on from round to round; `marks` are the aggregations between."""
    points: dict[str, list[tuple[float, Any]]] = {name: [] for name in colours}
    marks, offset = [], 0
    for round_done in rounds:
        losses = {device["name"]: device.get("step_losses") or [] for device in round_done.get("devices") or []}
        for name, values in losses.items():
            points.setdefault(name, []).extend(enumerate(values, start=offset + 1))
        offset += max(map(len, losses.values()), default=0)
        marks.append(offset + 0.5)
    return {
        "x": "step",
        "y": "loss a label (nats)",
        "lines": _lines(points, colours),
        "marks": [x for x in marks if x < offset],
    }


def _perplexity_figure(rounds: list[Event], colours: Mapping[str, str]) -> dict[str, Any]:
    """A round measures the adapter that it starts from, so round 1 stands at 0 rounds of training."""
    points: dict[str, list[tuple[float, Any]]] = {name: [] for name in colours}
    for round_done in rounds:
        for device in round_done.get("devices") or []:
            points.setdefault(device["name"], []).append((round_done["round"] - 1, device.get("perplexity")))
    return {"x": "rounds of training", "y": "perplexity", "lines": _lines(points, colours), "dots": True}


def _bytes_figure(rounds: list[Event]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {kind: [0.0] * len(rounds) for kind in (*FRAMES.values(), "adapters", "control")}
    for i, round_done in enumerate(rounds):
        for kind, count in (round_done.get("bytes_by_kind") or {}).items():
            stacks[FRAMES.get(kind, "control")][i] += count / 1e6
        for device in round_done.get("devices") or []:
            stacks["adapters"][i] += (total(device.get(key) for key in ADAPTER_BYTES) or 0) / 1e6
    return {"x": "round", "y": "megabytes (MB)", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k2", "--k3"))}


def _seconds_figure(rounds: list[Event]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {"training": [], "evaluation": [], "the rest": []}
    for round_done in rounds:
        spent = [(d.get("train_seconds") or 0, d.get("eval_seconds") or 0) for d in round_done.get("devices") or []]
        training, evaluation = max(spent, key=sum, default=(0, 0))
        rest = max(0, (round_done.get("seconds") or 0) - training - evaluation)
        for stack, seconds in zip(stacks.values(), (training, evaluation, rest), strict=True):
            stack.append(seconds)
    return {"x": "round", "y": "seconds (s)", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k3"))}


def _lines(points: Mapping[str, list[tuple[float, Any]]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    named = {name: list(zip(*own, strict=True)) or [(), ()] for name, own in points.items()}
    return [
        {"name": escape(name, quote=False), "color": colours.get(name, "--muted"), "x": xs, "y": ys}
        for name, (xs, ys) in named.items()
    ]


def _bars(rounds: list[Event], stacks: Mapping[str, list[float]], colours: Iterable[str]) -> list[dict[str, Any]]:
    names = [str(event["round"]) if is_training_round(event) else "evaluation" for event in rounds]
    coloured = zip(stacks.items(), colours, strict=True)
    return [{"name": kind, "color": colour, "x": names, "y": values} for (kind, values), colour in coloured]


def _finite(value: Any) -> Any:
    """Without nan and infinities (a run that diverged has them), which JSON cannot say."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _banner(failed: Event) -> str:
    reason, kept = escape(str(failed.get("reason"))), escape(str(failed.get("kept") or "nothing"))
    return f'<div class="card banner"><h2 class="failed">The run failed</h2><p>{reason}</p><p>Kept: {kept}</p></div>'


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    devices = summary["devices"]
    yield "time", human_seconds(summary["seconds"])
    yield "rounds", human_number(summary["rounds"])
    yield "devices", human_number(len(devices))
    yield "hosts", human_number(len(summary["hosts"]))
    yield "over links", human_bytes(total(device[key] for device in devices for key in LINK_BYTES))
    yield "adapters via Flower", human_bytes(total(device[key] for device in devices for key in ADAPTER_BYTES))


def _device_table(devices: list[dict[str, Any]], colours: Mapping[str, str]) -> str:
    rows = [
        [
            f'<span class="swatch" style="background: var({colours[device["name"]]})"></span>{escape(device["name"])}',
            human_number(device["examples"]),
            *(_exact(device[key], human_number(device[key], 2)) for key in ("perplexity_before", "perplexity_after")),
            _exact(device["tokens_per_s"], human_number(device["tokens_per_s"], 1)),
            *(_exact_bytes(device[key]) for key in (*LINK_BYTES, *ADAPTER_BYTES, "peak_rss_bytes")),
        ]
        for device in devices
    ]
    return _table("Devices", DEVICE_HEADINGS, rows)


def _host_table(hosts: list[dict[str, Any]]) -> str:
    rows = [
        [escape(host["name"]), human_layers(host["layers"])]
        + [_exact_bytes(host[key]) for key in (*LINK_BYTES, "peak_rss_bytes")]
        for host in hosts
    ]
    return _table("Hosts", "host|holds|sent|received|peak memory", rows, "narrow")


def _incident_table(events: list[dict[str, Any]]) -> str:
    """Who was refused, lost or left out, when and why; empty when all went well."""
    rows = [
        [human_seconds(event.get("time", 0) - events[0].get("time", 0)), *(escape(str(words)) for words in incident)]
        for event in events
        for incident in _incidents(event)
    ]
    table = _table("Incidents", "after|what|who|why", rows[:INCIDENTS_SHOWN], "words")
    more = f"<p>and {len(rows) - INCIDENTS_SHOWN} more in events.jsonl</p>" if len(rows) > INCIDENTS_SHOWN else ""
    return f'<section class="card">{table}{more}</section>' if rows else ""


def _incidents(event: Event) -> Iterator[tuple[str, Any, Any]]:
    """(what, who, why) of an event that somebody should know about."""
    match event.get("event"):
        case "node_refused":
            yield "refused", event.get("node"), event.get("reason")
        case "node_lost":
            yield f"lost in round {event.get('round')}", event.get("node"), event.get("reason")
        case "round_done":
            for device in event.get("devices") or []:
                for left in device.get("left_out") or []:
                    where = f"round {event.get('round')}, step {left.get('step')}"
                    yield f"left out of {where}", device["name"], left.get("reason")
        case "run_failed":
            yield "the run failed", "", event.get("reason")


def _settings(config: Any, path: str = "") -> Iterator[list[str]]:
    """A row for every key of the run file, with its path."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _settings(value, f"{path}.{key}" if path else str(key))
    else:
        yield [escape(path), escape(json.dumps(config, ensure_ascii=False))]


def _table(title: str, headings: str, rows: Iterable[list[str]], style: str = "") -> str:
    """A table of cells that are HTML already, under its title; empty without rows."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{heading}</th>" for heading in headings.split("|"))
    heading = f"<h2>{title}</h2>" if title else ""
    return f'{heading}<div class="scroll"><table class="{style}"><tr>{head}</tr>{body}</table></div>' if body else ""


def _exact(value: float | None, shown: str, unit: str = "") -> str:
    """A rounded value, the exact one in its tooltip."""
    return shown if value is None else f'<span title="{value}{unit}">{shown}</span>'


def _exact_bytes(count: int | None) -> str:
    return _exact(count, human_bytes(count), " B")
