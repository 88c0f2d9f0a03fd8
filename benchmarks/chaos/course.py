"""A run as its events tell it, while it goes on: rounds done, who took part, where the layers are. Knows no process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgelam_fl.errors import DataError
from edgelam_fl.model.adapter import read_peft_folder
from edgelam_fl.telemetry.events import (
    Event,
    EventTail,
    NodeLost,
    PlanMade,
    RoundDone,
    RunDone,
    RunFailure,
    UnknownEvent,
    of_kind,
)


@dataclass
class Course:
    """The events of one run so far."""

    folder: Path
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tail = EventTail(self.folder / "events.jsonl")

    def look(self) -> None:
        """Reads what is new."""
        self.events += self._tail.poll()

    @property
    def rounds(self) -> list[RoundDone]:
        """Rounds that trained, oldest first."""
        return [event for event in of_kind(self.events, RoundDone) if event.steps]

    @property
    def host(self) -> str:
        """The host that holds layers by the newest plan; empty: none."""
        plans = list(of_kind(self.events, PlanMade))
        hops = [hop.node for route in plans[-1].routes for hop in route.hops] if plans else []
        return hops[0] if hops else ""

    @property
    def ended(self) -> bool:
        return any(isinstance(event, RunDone | RunFailure) for event in self.events)

    @property
    def failed(self) -> str:
        """Why the run failed, by itself; empty if it did not."""
        return next((event.reason for event in of_kind(self.events, RunFailure)), "")

    def rounds_since(self, moment: float) -> list[RoundDone]:
        return [done for done in self.rounds if (done.time or 0.0) > moment]

    def lost_since(self, moment: float) -> list[tuple[str, str]]:
        """Returns nodes that were lost after a moment, with the reasons."""
        return [(lost.node, lost.reason) for lost in of_kind(self.events, NodeLost) if (lost.time or 0.0) > moment]

    def said_since(self, moment: float) -> list[str]:
        """Returns the kinds of events after a moment that tell of recovery, for the record."""
        kinds = [type(event).__name__ if not isinstance(event, UnknownEvent) else event.kind for event in self.events
                 if (event.time or 0.0) > moment and not isinstance(event, PlanMade | RoundDone)]  # fmt: skip
        return sorted(set(kinds) - {"RoundTimeline", "TextReadable", "RouteReady", "PlacementMade"})

    def repeated_rounds(self) -> list[int]:
        """Returns rounds that were done again after they, or later ones, had been done."""
        numbers = [done.round for done in self.rounds]
        return [number for before, number in pairwise(numbers) if number <= before]


def adapter_of(folder: Path) -> dict[str, np.ndarray] | str:
    """Returns a run's adapter, or what is wrong with it."""
    try:
        adapter = dict(read_peft_folder(folder / "adapter"))
    except (DataError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    if not all(np.isfinite(tensor).all() for tensor in adapter.values()):
        return "not finite"
    return adapter


def devices_missing(rounds: Sequence[RoundDone], devices: Sequence[str]) -> list[tuple[int, str]]:
    """Returns (round, device) for each device that was not in a round, or not in all of its steps."""
    missing = []
    for done in rounds:
        whole = {device.name for device in done.devices if not device.left_out}
        missing += [(done.round, name) for name in devices if name not in whole]
    return missing
