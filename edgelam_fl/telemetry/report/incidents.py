"""What went wrong in a run, from its events: why it failed, and who was refused, lost or left out. Plain text, no looks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from edgelam_fl.telemetry.summary import Event, human_seconds, of_kind

LOST_SHOWN = 5


def failure(events: Sequence[Event]) -> list[tuple[str, str]]:
    """(heading, text) of what happened, where, when, and what is kept; empty where the run did not fail."""
    failed = next(of_kind(events, "run_failed"), None)
    if failed is None:
        return []
    number = _failed_round(events, failed)
    lost = {
        e.get("node"): f"{e.get('node')}: {e.get('reason')}"
        for e in of_kind(events, "node_lost")
        if e.get("round") == number
    }
    more = [f"and {len(lost) - LOST_SHOWN} more, below"] if len(lost) > LOST_SHOWN else []
    facts = {
        "What": str(failed.get("reason") or "no reason was given"),
        "Where": _where(events, failed, number),
        "Lost before": "\n".join([*list(lost.values())[:LOST_SHOWN], *more]),
        "When": _when(events, failed),
        "Kept": str(failed.get("kept") or "nothing"),
    }
    return [(heading, text) for heading, text in facts.items() if text]


def incidents(events: Sequence[Event]) -> Iterator[tuple[str, str, str, str]]:
    """(after, what, who, why) of all that somebody should know about, in its order."""
    for event in events:
        after = human_seconds(event.get("time", 0) - events[0].get("time", 0))
        for incident in _incidents(event):
            yield after, *(str(words) for words in incident)  # type: ignore[misc]


def _incidents(event: Event) -> Iterator[tuple[str, Any, Any]]:
    match event.get("event"):
        case "node_refused":
            yield "refused", event.get("node"), event.get("reason")
        case "node_lost":
            yield f"lost in round {event.get('round')}", event.get("node"), event.get("reason")
        case "round_done":
            for device in event.get("devices") or []:
                for left in device.get("left_out") or []:
                    where = f"round {event.get('round')}, step {left.get('step', 0) + 1}"
                    yield f"left out of {where}", device["name"], left.get("reason")
        case "run_failed":
            yield "the run failed", event.get("node") or "", event.get("reason")


def _failed_round(events: Sequence[Event], failed: Event) -> int | None:
    """As the event says, else the round that was planned last."""
    planned = [event.get("round") for event in of_kind(events, "plan")]
    return failed.get("round") or (planned[-1] if planned else None)


def _where(events: Sequence[Event], failed: Event, number: int | None) -> str:
    at = f", at {failed['node']}" if failed.get("node") else ""
    if number is None:
        joined = ", ".join(str(event.get("node")) for event in of_kind(events, "node_joined"))
        return f"before the first round{at}; {joined or 'no node'} had joined"
    config = next(of_kind(events, "run_started"), {}).get("config") or {}
    rounds = (config.get("federation") or {}).get("rounds")
    name = f"round {number}" if rounds is None else f"round {number} of {rounds}"
    if rounds is not None and number > rounds:
        name = "the evaluation after the last round"
    closed = any(event.get("round") == number for event in of_kind(events, "round_done"))
    return f"{'after' if closed else 'in'} {name}{at}"


def _when(events: Sequence[Event], failed: Event) -> str:
    if "time" not in failed:
        return ""
    clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(failed["time"]))
    return f"{clock}, {human_seconds(failed['time'] - events[0].get('time', 0))} after the start"
