"""Failure and incidents of a run, from its events: nodes refused, lost or left out. Plain text, no looks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from edgelam_fl.errors import INTERRUPTED
from edgelam_fl.telemetry.events import (
    AggregateRefused,
    AttemptAborted,
    BestTaken,
    BudgetSpent,
    ContributionLeftOut,
    DiskFull,
    Event,
    EventsDropped,
    LateUpdate,
    MessageResent,
    NodeJoined,
    NodeLost,
    NodeRefused,
    NodeSetAside,
    PlanMade,
    RoundDone,
    RunFailure,
    RunInterrupted,
    RunResumed,
    RunWaits,
    StoppedEarly,
    TrackerFailed,
    of_kind,
)
from edgelam_fl.telemetry.human import human_bytes, human_seconds
from edgelam_fl.telemetry.summary import EARLY_ENDS, began, run_state, setting

LOST_SHOWN = 5


def failure(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Returns (heading, text) pairs: what happened, where, when, what is kept; empty if the run did not end early."""
    if run_state(events) not in EARLY_ENDS:
        return []
    failed = list(of_kind(events, RunFailure))[-1]
    number = _failed_round(events, failed)
    lost = {e.node: f"{e.node}: {e.reason}" for e in of_kind(events, NodeLost) if e.round == number}
    more = [f"and {len(lost) - LOST_SHOWN} more, below"] if len(lost) > LOST_SHOWN else []
    facts = {
        "What": failed.reason or "no reason was given",
        "Where": _where(events, failed, number),
        "Lost before": "\n".join([*list(lost.values())[:LOST_SHOWN], *more]),
        "When": _when(events, failed),
        "Kept": failed.kept or "nothing",
    }
    return [(heading, text) for heading, text in facts.items() if text]


def incidents(events: Sequence[Event]) -> Iterator[tuple[str, str, str, str]]:
    """Yields (after, what, who, why) of everything that the reader should know about, in its order; `after` the run's turn came."""
    if waits := list(of_kind(events, RunWaits)):
        yield "", f"waited {human_seconds(waits[-1].seconds)} for its turn", "", waits[0].words()
    for event in events:
        after = human_seconds((event.time or 0) - began(events))
        for what, who, why in _incidents(event):
            yield after, what, who, why


def _incidents(event: Event) -> Iterator[tuple[str, str, str]]:
    match event:
        case NodeRefused():
            yield "refused", event.node, event.reason
        case NodeLost():
            yield f"lost in round {event.round}", event.node, event.reason
        case AttemptAborted():
            yield f"attempt {event.attempt} at round {event.round} ended", event.node, event.reason
        case MessageResent():
            yield f"sent its part in round {event.round} again", event.node, event.reason
        case NodeSetAside():
            yield f"sits out until round {event.back_in}", event.node, event.reason
        case LateUpdate() if not event.used_in:
            yield f"late for round {event.round}, its update dropped", event.node, event.reason
        case ContributionLeftOut():
            yield f"left out of the aggregate of round {event.round}", event.source, event.reason
        case AggregateRefused():
            yield f"round {event.round}, attempt {event.attempt}: no aggregate", "", event.reason
        case BudgetSpent():
            why = f"epsilon {event.epsilon:.4g} of {event.budget:g} is spent, and another round would exceed it"
            yield f"the run ended after round {event.round} of {event.planned}", "", why
        case StoppedEarly():
            yield "the run ended early", "", event.words()
        case BestTaken() if event.round != event.last_round:
            yield "the result is not the last adapter", "", event.words()
        case RoundDone():
            for host in event.hosts:
                for one in host.left_out:
                    what = "out of" if one.out else f"left out of {one.steps} steps of"
                    yield f"{what} round {event.round}, by host {host.name}", one.device, one.reason
            for device in event.devices:
                for left in device.left_out:
                    yield f"left out of round {event.round}, step {left.step + 1}", device.name, left.reason
        case DiskFull():
            free, needed = human_bytes(event.free_bytes), human_bytes(event.needed_bytes)
            yield (
                f"waits for room on the disk since {event.waited_s:.0f} s",
                "",
                f"{free} are free, {needed} are needed",
            )
        case RunInterrupted():
            yield "the ServerApp died and was started again", "", event.reason
        case RunResumed():
            yield f"the run went on after round {event.round}", "", event.problem
        case EventsDropped():
            yield f"{event.count} events could not be written", "", event.reason
        case TrackerFailed():
            yield "a tracker gets nothing more", event.tracker, event.reason
        case RunFailure():
            yield f"the run {'was stopped' if event.exit_code == INTERRUPTED else 'failed'}", event.node, event.reason


def _failed_round(events: Sequence[Event], failed: RunFailure) -> int | None:
    """Returns the round that the event names, else the one that was planned last; None if none was planned."""
    planned = [plan.round for plan in of_kind(events, PlanMade)]
    return failed.round or (planned[-1] if planned else None)


def _where(events: Sequence[Event], failed: RunFailure, number: int | None) -> str:
    at = f", at {failed.node}" if failed.node else ""
    if number is None:
        joined = ", ".join(event.node for event in of_kind(events, NodeJoined))
        return f"before the first round{at}; {joined or 'no node'} had joined"
    rounds = setting(events, "federation", "rounds")
    name = f"round {number}" if rounds is None else f"round {number} of {rounds}"
    if rounds is not None and number > rounds:
        name = "the evaluation after the last round"
    closed = any(done.round == number for done in of_kind(events, RoundDone))
    return f"{'after' if closed else 'in'} {name}{at}"


def _when(events: Sequence[Event], failed: RunFailure) -> str:
    if failed.time is None:
        return ""
    clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(failed.time))
    return f"{clock}, {human_seconds(failed.time - began(events))} after the start"
