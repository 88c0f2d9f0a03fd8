"""The run on a terminal: what the events say, drawn again as they come. Without a terminal, one line a milestone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgelam_fl.telemetry.summary import (
    by_name,
    human_bytes,
    human_layers,
    human_measure,
    measure_of,
    measured,
    task_of,
)
from edgelam_fl.telemetry.timeline import read_phase

NAMES_SHOWN = 8
VALUES_SHOWN = 3


@dataclass
class _Row:
    """One node on the screen."""

    role: str = ""
    doing: str = "starting"
    loss: float | None = None
    quality: list[float] = field(default_factory=list)  # held-out, a round
    bytes_moved: int = 0
    waited: float | None = None  # the share of the latest train phase


class RunView:
    """Feed it every event; use it as a context manager around the run."""

    def __init__(self, console: Console, rounds: int, steps: int) -> None:
        self._console, self._rounds, self._steps = console, rounds, steps
        self._rows: dict[str, _Row] = {}
        self._round = 0
        self._measure = measure_of(None)
        self._stage = "starting"
        self._began = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw)

    def __enter__(self) -> RunView:
        if self._console.is_terminal:
            self._live.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._live.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """A milestone: stays on the screen, above the table."""
        elapsed = time.monotonic() - self._began
        self._console.print(f"[dim]{elapsed:5.0f} s[/dim]  {escape(text)}", highlight=False, soft_wrap=True)

    def feed(self, event: Mapping[str, Any], node: str = "") -> None:
        """One event of the ServerApp, or (with its name) of a node's stage host."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event, node)

    # ---------------------------------------------------------------- the ServerApp's events

    def _on_run_started(self, event: Mapping[str, Any], _: str) -> None:
        self._measure = measure_of(task_of([event]))

    def _on_node_joined(self, event: Mapping[str, Any], _: str) -> None:
        row = self._row(event["node"])
        row.role, row.doing = event["role"], "joined"
        holds = f"{event['examples']} examples, {event['held_out']} held out" if row.role == "device" else "no data"
        self.say(f"{event['node']} joined ({holds})")

    def _on_node_refused(self, event: Mapping[str, Any], _: str) -> None:
        self.say(f"{event['node']} cannot take part: {event['reason']}")

    def _on_link_measured(self, event: Mapping[str, Any], _: str) -> None:
        up, down = (
            f"{event[key] / 1e6:.3g} Mbit/s {way}" for key, way in (("link_up_bps", "up"), ("link_down_bps", "down"))
        )
        self.say(
            f"{event['node']}'s link to the server now: {up}, {down}, round trip {1e3 * event['round_trip_s']:.3g} ms"
        )

    def _on_placement(self, event: Mapping[str, Any], _: str) -> None:
        for text in event["measured"]:
            self.say(text)
        if event["changed"]:
            held = [h for site in event["sites"] for h in site["hosts"]]
            layers = ", ".join(f"{h['node']} {human_layers([h['first'], h['last']])}" for h in held)
            self.say(f"{layers}: {event['reason']}; a step of training should take {event['step_s']:.3g} s")

    def _on_plan(self, event: Mapping[str, Any], _: str) -> None:
        self._round = event["round"]
        self._stage = f"round {self._round} of {self._rounds}" if self._round <= self._rounds else "last evaluation"
        attempt = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
        if self._round <= self._rounds:
            self.say(f"{self._stage}{attempt}: {_over_sites(event)}")

    def _on_round_done(self, event: Mapping[str, Any], _: str) -> None:
        shown = []
        for device in event["devices"]:
            row = self._row(device["name"])
            row.loss = device["loss"] if device["loss"] is not None else row.loss
            row.bytes_moved += device["bytes_up"] + device["bytes_down"]
            row.doing = "waits"
            value = measured(device, self._measure)
            if value is not None:
                row.quality.append(value)
                shown.append(f"{device['name']} {self._short(value)}")
        for host in event["hosts"]:
            self._row(host["name"]).bytes_moved += host["bytes_up"] + host["bytes_down"]
        when = "at its start" if event["steps"] else "at the end"
        self.say(f"{self._stage} took {event['seconds']:.0f} s; held-out {self._measure} {when}: {_first_of(shown)}")

    def _on_timeline(self, event: Mapping[str, Any], _: str) -> None:
        phase = read_phase(event)
        for name, shares in phase.shares().items() if phase else ():
            self._row(name).waited = shares.waited_s / (shares.phase_s or 1)

    def _on_node_lost(self, event: Mapping[str, Any], _: str) -> None:
        self._row(event["node"]).doing = "lost"
        self.say(f"{event['node']} did not finish round {event['round']}: {event['reason']}")

    def _on_run_failed(self, _: Mapping[str, Any], __: str) -> None:
        """Whoever follows the run says why."""
        self._stage = f"failed in {self._stage}" if self._round else "failed before the first round"
        for row in self._rows.values():
            row.doing = row.doing if row.doing == "lost" else ""

    # ---------------------------------------------------------------- the stage hosts' events

    def _on_job_started(self, event: Mapping[str, Any], node: str) -> None:
        self._row(node).doing = "evaluates" if event["role"] == "device" else "serves"

    def _on_evaluated(self, _: Mapping[str, Any], node: str) -> None:
        self._row(node).doing = "evaluated"

    def _on_step(self, event: Mapping[str, Any], node: str) -> None:
        row = self._row(node)
        row.doing, row.loss = f"step {event['step'] + 1} of {self._steps}", event["loss"]

    def _on_step_closed(self, event: Mapping[str, Any], node: str) -> None:
        """A host's word; a device that hosts too tells of its own steps."""
        if self._row(node).role != "device":
            self._row(node).doing = f"step {event['step'] + 1} of {self._steps}"

    def _on_job_done(self, event: Mapping[str, Any], node: str) -> None:
        self._row(node).doing = "waits" if event["state"] == "done" else "failed"

    # ---------------------------------------------------------------- drawing

    def _row(self, name: str) -> _Row:
        return self._rows.setdefault(name, _Row())

    def _draw(self) -> RenderableType:
        """Fits 80 columns: a long name takes two lines rather than room from the numbers."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("node", overflow="fold")
        table.add_column("does", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column(self._measure, no_wrap=True)
        for heading in ("moved", "waited"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, row in sorted(self._rows.items(), key=lambda item: by_name(item[0])):
            loss = "" if row.loss is None else f"{row.loss:.3f}"
            quality = " > ".join(map(self._short, row.quality[-VALUES_SHOWN:])).replace(
                " % >", " >"
            )  # one unit for all
            waited = "" if row.waited is None else f"{100 * row.waited:.0f} %"
            table.add_row(escape(name), row.doing, loss, quality, human_bytes(row.bytes_moved), waited)
        elapsed = time.monotonic() - self._began
        return Group(Text(f"{self._stage}, {elapsed:.0f} s", style="bold"), table)

    def _short(self, value: float) -> str:
        return (
            human_measure(self._measure, value)
            if self._measure == "accuracy"
            else f"{value:.{1 if value < 1000 else 0}f}"
        )


def _over_sites(plan: Mapping[str, Any]) -> str:
    """The selected devices; with their hosts where they go over several sites."""
    ways = {
        route["device"]: tuple(hop["node"] for hop in route.get("hops") or []) for route in plan.get("routes") or []
    }
    if len(set(ways.values())) < 2:
        return _first_of(plan["selected"])
    grouped = groupby(sorted(ways, key=lambda name: (ways[name], by_name(name))), key=lambda name: ways[name])
    return "; ".join(f"{_first_of(names)} over {' > '.join(way) or 'no host'}" for way, names in grouped)


def _first_of(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - NAMES_SHOWN} more" if len(shown) > NAMES_SHOWN else ""
    return ", ".join(shown[:NAMES_SHOWN]) + more
