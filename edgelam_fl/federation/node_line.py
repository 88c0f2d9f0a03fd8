"""Shows the owner of a node what the node does at this moment, as its stage host tells it on this machine. Knows no process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.telemetry.events.progress import FETCHING, REPORTING
from edgelam_fl.telemetry.human import human_bytes
from edgelam_fl.telemetry.progress import NodeTail
from edgelam_fl.telemetry.waiting import DEFAULT_SIGNS, Reminder, SignTiming, waiting

IDLE = "waits for a run"


@contextmanager
def node_line(
    console: Console, name: str, state: Path, timing: SignTiming = DEFAULT_SIGNS
) -> Iterator[Callable[[], None]]:
    """Yields a function to call often, until the block ends: on a terminal it moves a line that says what the node does.

    Elsewhere, as in the journal of a service, only layers that come are said, since that may take long and needs the network.
    """
    tail = NodeTail(state)
    if console.is_terminal:
        with waiting(console, f"{name}: {IDLE}") as line:
            yield lambda: _move(name, tail, line.update)
    else:
        yield _Fetching(tail, Reminder(timing), lambda text: console.print(text, highlight=False, markup=False)).look


def _move(name: str, tail: NodeTail, show: Callable[[str], None]) -> None:
    found = tail.poll()
    if found is not None:
        show(f"{name}: {words_of(*found)}")


def words_of(round_: int, progress: NodeProgress) -> str:
    """Returns what a node does, in a few words."""
    if progress.doing == REPORTING:
        return f"its part of round {round_} is over"
    if progress.doing == FETCHING and progress.of_bytes:
        return f"round {round_}: {progress.words()} of {human_bytes(progress.of_bytes)}"
    loss = f", loss {progress.loss:.3f}" if progress.loss is not None else ""
    return f"round {round_}: {progress.words()}{loss}"


class _Fetching:
    """Says without a terminal how much of a node's layers has come."""

    def __init__(self, tail: NodeTail, reminder: Reminder, say: Callable[[str], None]) -> None:
        self._tail, self._reminder, self._say = tail, reminder, say
        self._text = ""  # empty: no layers come

    def look(self) -> None:
        found = self._tail.poll()
        if found is not None:
            fetches = found[1].doing == FETCHING
            if self._text and not fetches:
                self._say("all layers have come")
            self._text = words_of(*found) if fetches else ""
        if self._text and self._reminder.is_due(self._text):
            self._say(self._text)
