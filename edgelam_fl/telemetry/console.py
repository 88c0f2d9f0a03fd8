"""The run on a terminal: what the events say, drawn again as they come. Without a terminal, one line a milestone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgelam_fl.telemetry.summary import human_bytes


@dataclass
class _Row:
    """One node on the screen."""

    role: str = ""
    doing: str = "starting"
    loss: float | None = None
    perplexities: list[float] = field(default_factory=list)
    bytes_moved: int = 0


class RunView:
    """Feed it every event; use it as a context manager around the run."""

    def __init__(self, console: Console, rounds: int, steps: int) -> None:
        self._console, self._rounds, self._steps = console, rounds, steps
        self._rows: dict[str, _Row] = {}
        self._round = 0
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

    def _on_node_joined(self, event: Mapping[str, Any], _: str) -> None:
        row = self._row(event["node"])
        row.role, row.doing = event["role"], "joined"
        holds = f"{event['examples']} examples, {event['held_out']} held out" if row.role == "device" else "no data"
        self.say(f"{event['node']} joined ({holds})")

    def _on_node_refused(self, event: Mapping[str, Any], _: str) -> None:
        self.say(f"{event['node']} cannot take part: {event['reason']}")

    def _on_plan(self, event: Mapping[str, Any], _: str) -> None:
        self._round = event["round"]
        self._stage = f"round {self._round} of {self._rounds}" if self._round <= self._rounds else "last evaluation"
        attempt = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
        if self._round <= self._rounds:
            self.say(f"{self._stage}{attempt}: {', '.join(event['selected'])}")

    def _on_round_done(self, event: Mapping[str, Any], _: str) -> None:
        shown = []
        for device in event["devices"]:
            row = self._row(device["name"])
            row.loss = device["loss"] if device["loss"] is not None else row.loss
            row.bytes_moved += device["bytes_up"] + device["bytes_down"]
            row.doing = "waits for the server"
            if device["perplexity"] is not None:
                row.perplexities.append(device["perplexity"])
                shown.append(f"{device['name']} {device['perplexity']:.1f}")
        for host in event["hosts"]:
            self._row(host["name"]).bytes_moved += host["bytes_up"] + host["bytes_down"]
        when = "at its start" if event["steps"] else "at the end"
        self.say(f"{self._stage} took {event['seconds']:.0f} s; held-out perplexity {when}: {', '.join(shown)}")

    def _on_node_lost(self, event: Mapping[str, Any], _: str) -> None:
        self._row(event["node"]).doing = "lost"
        self.say(f"{event['node']} did not finish round {event['round']}: {event['reason']}")

    # ---------------------------------------------------------------- the stage hosts' events

    def _on_job_started(self, event: Mapping[str, Any], node: str) -> None:
        self._row(node).doing = "evaluates" if event["role"] == "device" else "serves"

    def _on_evaluated(self, event: Mapping[str, Any], node: str) -> None:
        self._row(node).doing = f"evaluated in {event['seconds']:.0f} s"

    def _on_step(self, event: Mapping[str, Any], node: str) -> None:
        row = self._row(node)
        row.doing, row.loss = f"step {event['step'] + 1} of {self._steps}", event["loss"]

    def _on_job_done(self, event: Mapping[str, Any], node: str) -> None:
        self._row(node).doing = "waits for the server" if event["state"] == "done" else "failed"

    # ---------------------------------------------------------------- drawing

    def _row(self, name: str) -> _Row:
        return self._rows.setdefault(name, _Row())

    def _draw(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading, justify in (
            ("node", "left"),
            ("does", "left"),
            ("loss", "right"),
            ("perplexity", "left"),
            ("moved", "right"),
        ):
            table.add_column(heading, justify=justify, style="", no_wrap=True)  # type: ignore[arg-type]
        for name, row in sorted(self._rows.items()):
            loss = "" if row.loss is None else f"{row.loss:.3f}"
            table.add_row(
                name,
                row.doing,
                loss,
                " > ".join(f"{p:.1f}" for p in row.perplexities[-4:]),
                human_bytes(row.bytes_moved),
            )
        elapsed = time.monotonic() - self._began
        return Group(Text(f"{self._stage}, {elapsed:.0f} s", style="bold"), table)
