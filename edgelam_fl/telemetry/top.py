"""`edgelam top`: the nodes of a run with their layers and work, from the run's events. Knows no processes.

The busy and waiting times are of the latest round with a timeline, in seconds of its train phase.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgelam_fl.telemetry.events import (
    Event,
    NodeJoined,
    NodeLost,
    NodeRefused,
    NodeResult,
    NodeShares,
    PlanMade,
    RoundDone,
    RoundProgress,
    RoundShares,
    SiteLost,
    of_kind,
)
from edgelam_fl.telemetry.human import (
    NOTHING,
    by_name,
    human_bytes,
    human_layers,
    human_seconds,
    total,
)
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.run_folder import FINAL, RunSource, state_of, waits_for
from edgelam_fl.telemetry.summary import build_summary, finished_rounds, setting
from edgelam_fl.telemetry.summary_words import counts_in_words

_REFRESH_S = 1.0


@dataclass(frozen=True, kw_only=True)
class NodeNow:
    """One node as it is now. Seconds and bytes are None if they are not known."""

    name: str
    role: str | None  # "device", "edge"; None if it never joined
    state: str  # "here", "gone"
    holds: tuple[tuple[int, int], ...]  # layers [first, last) that the latest plan gives it; a device's ends are two
    doing: str  # in the round that is played, in words; "" if nobody knows
    reason: str | None  # why it is gone
    computed_s: float | None
    sent_s: float | None
    waited_s: float | None
    bytes_up: int | None  # over all rounds
    bytes_down: int | None
    celsius: float | None  # of its processor, after its latest part
    slowed: str  # why that was slowed down then; "": it was not, or nobody tells


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
    state: str  # as of state_of in run_folder.py
    round: int  # of the latest plan, and one above `rounds` for the evaluation after the last; 0 before the first
    rounds: int | None  # of the run file; None if the run has not said
    seconds: float | None
    steps_per_s: float | None
    nodes: tuple[NodeNow, ...]
    departures: tuple[Departure, ...]
    now: str  # where the round stands, in words; "" if nobody knows
    waits_for: str  # the run that it waits for, in words; "" if it does not
    data: tuple[str, ...]  # sentences about what is not used of the devices' data


def follow(console: Console, run: RunSource, once: bool, as_json_text: bool) -> None:
    """Shows the run until it ends; with `once`, `as_json_text` or without a terminal only as it is now."""
    events = run.poll()
    now = snapshot(events, state_of(events, run.alive()), run.name, run.progress())
    if as_json_text:
        console.print(json.dumps(as_json(now), indent=2), markup=False, highlight=False, soft_wrap=True)
        return
    if once or not console.is_terminal:
        console.print(top_view(now))
        return
    with Live(top_view(now), console=console, auto_refresh=False) as live:
        while now.state not in FINAL:  # a server starts a run that was killed again
            time.sleep(_REFRESH_S)
            events += run.poll()
            now = snapshot(events, state_of(events, run.alive()), run.name, run.progress())
            live.update(top_view(now), refresh=True)


def snapshot(
    events: Sequence[Event], state: str = "", name: str | None = None, progress: RoundProgress | None = None
) -> Snapshot:
    """Returns the run as the events so far show it. `state`: as for `build_summary`. `name`: of a run that has not said its own.
    `progress`: where the round stands; None: nobody knows.
    """
    doing = {name: node.words() for name, node in (progress.nodes or {}).items()} if progress is not None else {}
    summary, rounds = build_summary(events, state, name), finished_rounds(events)
    shares, holds, gone = _shares(events), _holds(events), _gone(events)
    roles = {event.node: event.role for event in of_kind(events, NodeJoined)}
    names = sorted({*roles, *gone, *holds, *shares}, key=by_name)
    return Snapshot(
        run=summary.run,
        state=summary.state,
        round=max((plan.round for plan in of_kind(events, PlanMade)), default=0),
        rounds=setting(events, "federation", "rounds"),
        seconds=_seconds(events, progress, summary.seconds),
        steps_per_s=_step_rate(rounds),
        nodes=tuple(
            _node(
                name,
                roles.get(name),
                gone.get(name),
                holds.get(name, ()),
                doing.get(name, ""),
                shares.get(name),
                rounds,
            )
            for name in names
        ),
        now=progress.words() if progress is not None else "",
        departures=departures(events),
        waits_for=waits_for(events, summary.state),
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
    doing: str,
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
        doing=doing,
        reason=reason,
        computed_s=round(shares.computed_s, 3) if shares else None,
        sent_s=round(shares.sent_s, 3) if shares else None,
        waited_s=round(shares.waited_s, 3) if shares else None,
        bytes_up=total(record.bytes_up for record in moved),
        bytes_down=total(record.bytes_down for record in moved),
        celsius=moved[-1].celsius if moved else None,
        slowed=moved[-1].slowed if moved else "",
    )


def _records(done: RoundDone) -> tuple[NodeResult, ...]:
    return (*done.devices, *done.hosts)


def _seconds(events: Sequence[Event], progress: RoundProgress | None, by_events: float | None) -> float | None:
    """Returns how long the run has taken: to its newest event, or to the progress of its round."""
    if progress is None or progress.time is None or not events or events[0].time is None:
        return by_events
    return round(max(by_events or 0.0, progress.time - events[0].time), 3)


def _step_rate(rounds: Sequence[RoundDone]) -> float | None:
    """Returns steps per second in the latest round that trained, of the device with the most steps."""
    for done in reversed(rounds):
        rates = [(len(d.step_losses), d.train_seconds) for d in done.devices if d.step_losses and d.train_seconds]
        if rates:
            steps, seconds = max(rates)
            return round(steps / seconds, 4)
    return None


def top_view(shown: Snapshot) -> Group:
    """Draws a snapshot: what the run does, a row per node, and below it the departures and what is not used of the data."""
    what = [shown.state]
    what += [_round(shown)] if shown.round else []
    what += [shown.now] if shown.now else []
    what += [f"{shown.steps_per_s:,.2f} steps/s"] if shown.steps_per_s is not None else []
    what += [human_seconds(shown.seconds)] if shown.seconds is not None and not shown.waits_for else []
    below = [shown.waits_for] if shown.waits_for else []
    for gone in shown.departures:
        when = f" in round {gone.round}" if gone.round else ""
        below.append(f"{gone.name} left{when}: {gone.reason}")
    below += [f"{node.name} was slowed down: {node.slowed}" for node in shown.nodes if node.slowed]
    table = [_node_table(shown.nodes)] if shown.nodes else []
    return Group(
        Text(f"{shown.run or 'run'}: {', '.join(what)}", style="bold"), *table, *map(Text, [*below, *shown.data])
    )


def _round(shown: Snapshot) -> str:
    if shown.rounds is None:
        return f"round {shown.round}"
    return f"round {shown.round} of {shown.rounds}" if shown.round <= shown.rounds else "last evaluation"


def _node_table(nodes: Sequence[NodeNow]) -> Table:
    """Draws a row per node; how hot each is, if one tells."""
    heat = any(node.celsius is not None for node in nodes)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    with_doing = any(node.doing for node in nodes)
    for heading in ("node", "holds", *(["does"] if with_doing else [])):
        table.add_column(heading, overflow="fold")
    for heading in ("busy", "waiting", "sent", "received", *(["heat"] if heat else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for node in nodes:
        table.add_row(*_cells(node, with_doing), *([_degrees(node.celsius)] if heat else []))
    return table


def _degrees(celsius: float | None) -> str:
    return NOTHING if celsius is None else f"{celsius:.0f} °C"


def _cells(node: NodeNow, with_doing: bool) -> list[str]:
    busy = total((node.computed_s, node.sent_s))
    name = escape(node.name)
    return [
        f"[dim]{name} (gone)[/dim]" if node.state == "gone" else name,
        ", ".join(map(human_layers, node.holds)) or NOTHING,
        *([node.doing or NOTHING] if with_doing else []),
        human_seconds(busy),
        human_seconds(node.waited_s),
        human_bytes(node.bytes_up),
        human_bytes(node.bytes_down),
    ]
