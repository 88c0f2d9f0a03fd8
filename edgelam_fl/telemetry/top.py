"""`edgelam top`: the nodes of a run with their layers and work, from the run's events. Knows no processes.

The busy and waiting times are of the latest round with a timeline, in seconds of its train phase.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from edgelam_fl.errors import ConfigError
from edgelam_fl.telemetry.events import (
    EVENTS_FILE,
    Event,
    EventTail,
    NodeJoined,
    NodeLost,
    NodeRefused,
    NodeResult,
    NodeShares,
    PlanMade,
    RoundDone,
    RoundShares,
    SiteLost,
    of_kind,
)
from edgelam_fl.telemetry.human import (
    NOTHING,
    by_name,
    human_bytes,
    human_layers,
    human_number,
    human_seconds,
    total,
)
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.run_folder import state_now
from edgelam_fl.telemetry.summary import build_summary, counts_in_words, finished_rounds

_REFRESH_S = 1.0


@dataclass(frozen=True, kw_only=True)
class NodeNow:
    """One node as it is now. Seconds and bytes are None if they are not known."""

    name: str
    role: str | None  # "device", "edge"; None if it never joined
    state: str  # "here", "gone"
    holds: tuple[tuple[int, int], ...]  # layers [first, last) that the latest plan gives it; a device's ends are two
    reason: str | None  # why it is gone
    computed_s: float | None
    sent_s: float | None
    waited_s: float | None
    bytes_up: int | None  # over all rounds
    bytes_down: int | None


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A node or site that was lost or refused, even if it came back."""

    time: float | None  # Unix seconds
    round: int | None  # None: outside of a round
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run as it is now; `--json` prints it with these names."""

    run: str | None
    state: str  # "running", "done", "failed", "killed"
    round: int  # of the latest plan; 0 before the first
    seconds: float | None
    steps_per_s: float | None
    nodes: tuple[NodeNow, ...]
    departures: tuple[Departure, ...]
    data: tuple[str, ...]  # sentences about what is not used of the devices' data


def newest_run(root: Path = Path("runs")) -> Path:
    """Returns the folder under `root` whose events are the newest."""
    found = sorted(root.glob(f"*/{EVENTS_FILE}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ConfigError(f"no run under {root.absolute()}; name a run's folder: edgelam top RUN")
    return found[-1].parent


def follow(console: Console, folder: Path, once: bool, as_json_text: bool) -> None:
    """Shows the run until it ends; with `once` or `as_json_text` only as it is now."""
    if not (folder / EVENTS_FILE).is_file():
        raise ConfigError(f"{folder} is not a run's folder: it has no {EVENTS_FILE}")
    tail = EventTail(folder / EVENTS_FILE)
    events = tail.poll()
    if as_json_text:
        text = json.dumps(as_json(snapshot(events, state_now(folder, events))), indent=2)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    if once or not console.is_terminal:
        console.print(top_table(snapshot(events, state_now(folder, events))))
        return
    with Live(top_table(snapshot(events)), console=console, auto_refresh=False) as live:
        state = "running"
        while state in ("running", "killed"):  # a server starts a run that was killed again
            time.sleep(_REFRESH_S)
            events += tail.poll()
            state = state_now(folder, events)
            live.update(top_table(snapshot(events, state)), refresh=True)


def snapshot(events: Sequence[Event], state: str = "") -> Snapshot:
    """Returns the run as the events so far show it. `state`: as for `build_summary`."""
    summary, rounds = build_summary(events, state), finished_rounds(events)
    shares, holds, gone = _shares(events), _holds(events), _gone(events)
    roles = {event.node: event.role for event in of_kind(events, NodeJoined)}
    names = sorted({*roles, *gone, *holds, *shares}, key=by_name)
    return Snapshot(
        run=summary.run,
        state=summary.state,
        round=max((plan.round for plan in of_kind(events, PlanMade)), default=0),
        seconds=summary.seconds,
        steps_per_s=_step_rate(rounds),
        nodes=tuple(
            _node(name, roles.get(name), gone.get(name), holds.get(name, ()), shares.get(name), rounds)
            for name in names
        ),
        departures=departures(events),
        data=tuple(counts_in_words(summary.devices)),
    )


def departures(events: Iterable[Event]) -> tuple[Departure, ...]:
    """Returns all departures, oldest first: of sites too, and of nodes that came back."""
    found = []
    for event in events:
        match event:
            case NodeLost():
                found.append(Departure(time=event.time, round=event.round, name=event.node, reason=event.reason))
            case NodeRefused():
                found.append(Departure(time=event.time, round=None, name=event.node, reason=event.reason))
            case SiteLost():
                reason = f"its hosts are missing: {', '.join(event.missing)}"
                found.append(Departure(time=event.time, round=event.round, name=event.site, reason=reason))
    return tuple(found)


def _gone(events: Iterable[Event]) -> dict[str, str]:
    """Returns the reason per node that left and has not come back."""
    gone: dict[str, str] = {}
    for event in events:
        if isinstance(event, NodeLost | NodeRefused):
            gone[event.node] = event.reason
        elif isinstance(event, NodeJoined):
            gone.pop(event.node, None)
    return gone


def _holds(events: Sequence[Event]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Returns the layers [first, last) per node of the latest plan; a device's front and back are two ranges."""
    plan = next(of_kind(reversed(events), PlanMade), None)
    holds: dict[str, tuple[tuple[int, int], ...]] = {}
    for route in plan.routes if plan else ():
        ends = ((0, route.front), (route.back_first, route.num_layers))
        holds[route.device] = (*holds.get(route.device, ()), *(span for span in ends if span[0] < span[1]))
        for hop in route.hops:
            spans, span = holds.get(hop.node, ()), (hop.first, hop.last)
            holds[hop.node] = spans if span in spans else (*spans, span)
    return holds


def _shares(events: Sequence[Event]) -> Mapping[str, NodeShares]:
    return next((newest.nodes for newest in of_kind(reversed(events), RoundShares) if newest.nodes), {})


def _node(
    name: str,
    role: str | None,
    reason: str | None,
    holds: tuple[tuple[int, int], ...],
    shares: NodeShares | None,
    rounds: Iterable[RoundDone],
) -> NodeNow:
    """Describes one node. The bytes of a device that is a host too are those of both its parts."""
    moved = [record for done in rounds for record in _records(done) if record.name == name]
    return NodeNow(
        name=name,
        role=role,
        state="here" if reason is None else "gone",
        holds=holds,
        reason=reason,
        computed_s=round(shares.computed_s, 3) if shares else None,
        sent_s=round(shares.sent_s, 3) if shares else None,
        waited_s=round(shares.waited_s, 3) if shares else None,
        bytes_up=total(record.bytes_up for record in moved),
        bytes_down=total(record.bytes_down for record in moved),
    )


def _records(done: RoundDone) -> tuple[NodeResult, ...]:
    return (*done.devices, *done.hosts)


def _step_rate(rounds: Sequence[RoundDone]) -> float | None:
    """Returns steps per second in the latest round that trained, of the device with the most steps."""
    for done in reversed(rounds):
        rates = [(len(d.step_losses), d.train_seconds) for d in done.devices if d.step_losses and d.train_seconds]
        if rates:
            steps, seconds = max(rates)
            return round(steps / seconds, 4)
    return None


def top_table(shown: Snapshot) -> Table:
    """Draws a snapshot: a row per node, the departures below."""
    rate = f"{human_number(shown.steps_per_s, 2)} steps/s"
    title = f"{escape(str(shown.run or 'run'))}: {shown.state}, round {shown.round}, {rate}"
    table = Table(
        title=f"{title}, {human_seconds(shown.seconds)}\n", title_justify="left", box=SIMPLE_HEAD, show_edge=False
    )
    for heading in ("node", "holds"):
        table.add_column(heading, overflow="fold")
    for heading in ("busy", "waiting", "sent", "received"):
        table.add_column(heading, justify="right", no_wrap=True)
    for node in shown.nodes:
        table.add_row(*_cells(node))
    for gone in shown.departures:
        when = f" in round {gone.round}" if gone.round else ""
        table.caption = f"{table.caption or ''}{escape(gone.name)} left{when}: {escape(gone.reason)}\n"
    for text in shown.data:
        table.caption = f"{table.caption or ''}{escape(text)}\n"
    table.caption_justify = "left"
    return table


def _cells(node: NodeNow) -> list[str]:
    busy = total((node.computed_s, node.sent_s))
    name = escape(node.name)
    return [
        f"[dim]{name} (gone)[/dim]" if node.state == "gone" else name,
        ", ".join(map(human_layers, node.holds)) or NOTHING,
        human_seconds(busy),
        human_seconds(node.waited_s),
        human_bytes(node.bytes_up),
        human_bytes(node.bytes_down),
    ]
