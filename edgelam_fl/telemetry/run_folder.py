"""What a run's folder says about a run that did not end well: whether it goes on, what is kept, how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from edgelam_fl.files import is_held
from edgelam_fl.telemetry.events import EVENTS_FILE, Event
from edgelam_fl.telemetry.summary import run_state

CHECKPOINTS = "checkpoints"


def kept(folder: Path, options: str = "") -> str:
    """Returns a sentence that names what is left of a run that did not end well, and the command that goes on.

    options: of that command, by which it finds the run's server.
    """
    if (folder / "adapter").is_dir() or (folder / CHECKPOINTS).is_dir():
        return (
            f"Kept: the adapter after the last finished round, in {folder / 'adapter'}, and {EVENTS_FILE} beside it. "
            f"{way_on(folder, options)}"
        )
    return f"No round was finished; {folder} holds the events so far."


def way_on(folder: Path, options: str = "") -> str:
    """Returns the command that goes on with a run, in words. options: as of `kept`."""
    return f"`edgelam run --resume {shlex.quote(str(folder))}{options}` goes on"


def state_now(folder: Path, events: Iterable[Event]) -> str:
    """Returns "done", "failed" or "running" by the run's events; "killed" if they do not say that it ended, but nobody runs it.

    Seen from another machine, or after a version that left no trace of its process, such a run is "running".
    """
    state = run_state(events)
    return "killed" if state == "running" and is_held(folder) is False else state
