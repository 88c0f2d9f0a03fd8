"""`edgelam top`: who is here, what each node holds and does, made from a run's events. Knows no processes.

The busy and waiting times are of the latest round whose timeline came, in seconds of its train phase.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from edgelam_fl.errors import ConfigError
from edgelam_fl.telemetry.events import EventTail
from edgelam_fl.telemetry.summary import (
    LINK_BYTES,
    NOTHING,
    Event,
    build_summary,
    by_name,
    human_bytes,
    human_layers,
    human_number,
    human_seconds,
    of_kind,
    run_state,
    total,
)
from edgelam_fl.telemetry.timeline import Shares, read_phase

EVENTS = "events.jsonl"
_GONE = ("node_lost", "node_refused")
_REFRESH_S = 1.0


def newest_run(root: Path = Path("runs")) -> Path:
    """The folder under `root` whose events are the newest."""
    found = sorted(root.glob(f"*/{EVENTS}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ConfigError(f"no run under {root.absolute()}; name a run's folder: edgelam top RUN")
    return found[-1].parent


def follow(console: Console, folder: Path, once: bool, as_json: bool) -> None:
    """Shows the run until it ends; `once` and `as_json`: as it is now."""
    if not (folder / EVENTS).is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no {EVENTS}")
    tail = EventTail(folder / EVENTS)
    events = tail.poll()
    if as_json:
        console.print(json.dumps(snapshot(events), indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    if once or not console.is_terminal:
        console.print(top_table(snapshot(events)))
        return
    with Live(top_table(snapshot(events)), console=console, auto_refresh=False) as live:
        while run_state(events) == "running":
            time.sleep(_REFRESH_S)
            events += tail.poll()
            live.update(top_table(snapshot(events)), refresh=True)


def snapshot(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` prints: {run, state, round, seconds, steps_per_s, nodes [{name, role, state, holds, computed_s, sent_s,
    waited_s, bytes_up, bytes_down, reason}], departures [{time, round, name, reason}]}. Unknown is null."""
    summary, rounds = build_summary(list(events)), list(of_kind(events, "round_done"))
    shares, holds, gone = _shares(events), _holds(events), _gone(events)
    roles = {e["node"]: e.get("role") for e in of_kind(events, "node_joined")}
    names = sorted({*roles, *gone, *holds, *shares}, key=by_name)
    return {
        "run": summary["run"],
        "state": summary["state"],
        "round": max((e.get("round") or 0 for e in of_kind(events, "plan")), default=0),
        "seconds": summary["seconds"],
        "steps_per_s": _step_rate(rounds),
        "nodes": [
            {"name": name, "role": roles.get(name), "state": "gone" if name in gone else "here"}
            | {"holds": holds.get(name, []), "reason": gone.get(name)}
            | _spent(shares.get(name))
            | _moved(name, rounds)
            for name in names
        ],
        "departures": departures(events),
    }


def departures(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Every one, oldest first, of sites too, also of nodes that came back."""
    kinds = (*_GONE, "site_lost")
    return [
        {"time": e.get("time"), "round": e.get("round"), "name": e.get("node") or e.get("site"), "reason": _reason(e)}
        for e in events
        if e.get("event") in kinds
    ]


def _reason(event: Event) -> str:
    return str(event.get("reason") or f"its hosts are missing: {', '.join(event.get('missing') or [])}")


def _gone(events: Sequence[Event]) -> dict[str, str]:
    """{node: why}, of those that have not come back since."""
    gone: dict[str, str] = {}
    for event in events:
        if event.get("event") in _GONE:
            gone[event["node"]] = _reason(event)
        elif event.get("event") == "node_joined":
            gone.pop(event["node"], None)
    return gone


def _holds(events: Sequence[Event]) -> dict[str, list[list[int]]]:
    """{node: the layers [first, last) that the latest plan gives it}; a device's front and back are two."""
    plan = next(of_kind(reversed(events), "plan"), {})
    holds: dict[str, list[list[int]]] = {}
    for route in plan.get("routes") or []:
        ends = [[0, route["front"]], [route["back_first"], route["num_layers"]]]
        holds.setdefault(route["device"], []).extend(span for span in ends if span[0] < span[1])
        for hop in route.get("hops") or []:
            spans = holds.setdefault(hop["node"], [])
            if [hop["first"], hop["last"]] not in spans:
                spans.append([hop["first"], hop["last"]])
    return holds


def _shares(events: Sequence[Event]) -> dict[str, Shares]:
    phase = next(filter(None, map(read_phase, of_kind(reversed(events), "timeline"))), None)
    return phase.shares() if phase else {}


def _spent(shares: Shares | None) -> dict[str, float | None]:
    keys = ("computed_s", "sent_s", "waited_s")
    return {key: round(getattr(shares, key), 3) if shares else None for key in keys}


def _moved(name: str, rounds: Sequence[Event]) -> dict[str, int | None]:
    """Of all rounds. A device that is a host too is in both lists, with what it counted as each."""
    records = [r for done in rounds for role in ("devices", "hosts") for r in done.get(role) or [] if r["name"] == name]
    return {key: total(record.get(key) for record in records) for key in LINK_BYTES}


def _step_rate(rounds: Sequence[Event]) -> float | None:
    """Steps a second of the latest round that trained: of the device with the most steps."""
    for done in reversed(rounds):
        rates = [
            (len(device["step_losses"]), device["train_seconds"])
            for device in done.get("devices") or []
            if device.get("step_losses") and device.get("train_seconds")
        ]
        if rates:
            steps, seconds = max(rates)
            return round(steps / seconds, 4)
    return None


def top_table(shown: dict[str, Any]) -> Table:
    rate = f"{human_number(shown['steps_per_s'], 2)} steps/s"
    title = f"{escape(str(shown['run'] or 'run'))}: {shown['state']}, round {shown['round']}, {rate}"
    table = Table(
        title=f"{title}, {human_seconds(shown['seconds'])}\n", title_justify="left", box=SIMPLE_HEAD, show_edge=False
    )
    for heading in ("node", "holds"):
        table.add_column(heading, overflow="fold")
    for heading in ("busy", "waiting", "sent", "received"):
        table.add_column(heading, justify="right", no_wrap=True)
    for node in shown["nodes"]:
        table.add_row(*_cells(node))
    for gone in shown["departures"]:
        when = f" in round {gone['round']}" if gone["round"] else ""
        table.caption = f"{table.caption or ''}{escape(str(gone['name']))} left{when}: {escape(gone['reason'])}\n"
    table.caption_justify = "left"
    return table


def _cells(node: dict[str, Any]) -> list[str]:
    busy = total((node["computed_s"], node["sent_s"]))
    name = escape(str(node["name"]))
    return [
        f"[dim]{name} (gone)[/dim]" if node["state"] == "gone" else name,
        ", ".join(map(human_layers, node["holds"])) or NOTHING,
        human_seconds(busy),
        human_seconds(node["waited_s"]),
        human_bytes(node["bytes_up"]),
        human_bytes(node["bytes_down"]),
    ]
