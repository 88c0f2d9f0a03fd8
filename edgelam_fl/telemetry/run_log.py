"""`edgelam log`: what a run said, as lines of text with the time since its first event. Knows no processes and no server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich.console import Console

from edgelam_fl.telemetry.console import RunView
from edgelam_fl.telemetry.events import Event, RoundProgress, RunDone, RunFailure, as_line
from edgelam_fl.telemetry.human import human_moment
from edgelam_fl.telemetry.run_folder import FINAL, RunSource, state_of
from edgelam_fl.telemetry.summary import ENDED
from edgelam_fl.telemetry.waiting import Reminder, SignTiming

_POLL_S = 1.0
_GRACE_S = 60.0  # for a server to start a killed ServerApp again
_LAST = {
    "killed": "its process ended without a last word",
    "never begun": "nothing was ever heard of it",
    "starting": "it has said nothing yet",
}


@dataclass
class RunLog:
    """Prints a run's events as they come."""

    console: Console
    as_json: bool = False
    """Whether to print the lines of events.jsonl as they are."""
    _view: RunView | None = None
    _now_s: float = 0.0
    _events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reminder = Reminder(SignTiming(now=lambda: self._now_s))

    def show(self, events: Iterable[Event]) -> None:
        """Prints these events."""
        for event in events:
            self._events.append(event)
            if self.as_json:
                self._print(json.dumps({"time": event.time, **as_line(event)}, ensure_ascii=False))
                continue
            if isinstance(event, RoundProgress):
                self.go_on(event)
                continue
            self._now_s = event.time or self._now_s
            if self._view is None:
                self._print(human_moment(self._now_s))
                self._view = RunView(self.console, 0, 0, SignTiming(now=lambda: self._now_s))
            self._view.feed(event)
            self._reminder.postpone()
            if isinstance(event, RunFailure):
                self._view.say(f"the run {state_of([event], False)}: {event.reason}; {event.kept}")
            elif isinstance(event, RunDone):
                self._view.say("the run is done")

    def go_on(self, progress: RoundProgress | None) -> None:
        """Says where the round stands, every now and then."""
        if self._view is None or self.as_json or progress is None:
            return
        self._now_s = max(self._now_s, progress.time or 0.0)
        self._view.feed(progress)
        if self._reminder.is_due(self._view.status()):
            self._view.say(self._view.status())

    def state(self, alive: bool | None) -> str:
        """Returns how the run stands by what was shown. alive: as of `state_of`."""
        return state_of(self._events, alive)

    def end(self, state: str) -> None:
        """Says how the run stands, unless its own last word has."""
        if state not in ENDED and not self.as_json:
            self._print(f"{state}: {_LAST[state]}" if state in _LAST else f"(the run is {state})")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_log(
    console: Console,
    run: RunSource,
    *,
    follow: bool = False,
    as_json: bool = False,
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Prints what a run has said and, with `follow`, what it says until it ends.

    A run whose process was killed is followed on for a minute, in which a server starts it again.
    """
    log = RunLog(console, as_json)
    killed_since = None
    while True:
        log.show(run.poll())
        state = log.state(run.alive())
        if state == "running":
            log.go_on(run.progress())
        killed_since = (killed_since if killed_since is not None else now()) if state == "killed" else None
        is_lost = killed_since is not None and now() - killed_since >= _GRACE_S
        if not follow or is_lost or state in FINAL:
            return log.end(state)
        sleep(_POLL_S)
