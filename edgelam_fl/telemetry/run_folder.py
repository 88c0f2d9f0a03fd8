"""What a run's folder says about the run: its true state, what is kept, how to go on.

The one place that decides about a state. Knows folders of this machine, and no server: what only Flower has heard of is not seen.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgelam_fl.errors import INTERRUPTED, ConfigError, DataError, nearest
from edgelam_fl.files import is_held
from edgelam_fl.telemetry.events import (
    EVENTS_FILE,
    Event,
    EventLog,
    EventTail,
    RoundDone,
    RoundProgress,
    RunDone,
    RunFailure,
    RunInterrupted,
    RunResumed,
    RunStarted,
    RunWaits,
    of_kind,
    read_events,
)
from edgelam_fl.telemetry.human import human_seconds
from edgelam_fl.telemetry.progress import progress_of, read_progress
from edgelam_fl.telemetry.summary import (
    EARLY_ENDS,
    ENDED,
    began,
    finished_rounds,
    is_training_round,
    run_state,
    setting,
)

RUNS = Path("runs")
"""Where runs have their folders by default, below the directory of the command."""
CHECKPOINTS = "checkpoints"
COMMAND_LOCK = ".command.lock"
"""Locked in a run's folder by the command whose processes are the whole federation, as long as it lives."""
FINAL = (*ENDED, "never begun")
"""The states that a run never leaves."""
_CONFIG = "config.toml"
_POLL_S = 0.2
_LISTED = (RunStarted, RunWaits, RoundDone, RunDone, RunFailure, RunResumed, RunInterrupted)


# ---------------------------------------------------------------- how a run stands


def state_now(folder: Path, events: Collection[Event]) -> str:
    """Returns how the run in a folder of this machine stands; `events`: all that it has said. The words are those of `state_of`."""
    return state_of(events, is_alive(folder))


def state_of(events: Collection[Event], alive: bool | None) -> str:
    """Returns how a run stands.

    "starting": it has said nothing yet. "waiting": for other runs. "running". "done", "stopped" or "failed", as it said itself.
    "killed": it runs nowhere and did not say how it ended. "never begun": it runs nowhere and never said a word.

    alive: whether a process works on it; None: that cannot be seen, as on some network disks, and its own words are believed.
    """
    state = run_state(events)
    if state in ENDED:
        return state
    if not events:
        return "starting" if alive else "never begun"
    return "killed" if alive is False else state


def is_alive(folder: Path) -> bool | None:
    """Returns whether a process of this machine works on the run in a folder: its ServerApp, or the command that plays all
    parts. None: no process ever did, or that cannot be seen.
    """
    known = [held for held in (is_held(folder), is_held(folder, COMMAND_LOCK)) if held is not None]
    return any(known) if known else None


class RunSource(Protocol):
    """A source of a run's events: its folder, or its server."""

    name: str
    """The run's name, for a run that has not said one."""

    def poll(self) -> list[Event]:
        """Returns the events since the last call, oldest first."""

    def alive(self) -> bool | None:
        """Returns whether a process works on the run; None: unknown."""

    def progress(self) -> RoundProgress | None:
        """Returns where the round stands; None while nobody plays."""


class FolderSource:
    """A run in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.absolute().name
        self._folder, self._tail = folder, EventTail(folder / EVENTS_FILE)

    def poll(self) -> list[Event]:
        return self._tail.poll()

    def alive(self) -> bool | None:
        return is_alive(self._folder)

    def progress(self) -> RoundProgress | None:
        """A run that was killed may have left one, which means nothing."""
        return progress_of(read_progress(self._folder)) if self.alive() is not False else None


def await_end(
    run: RunSource,
    patience_s: float,
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> str:
    """Waits until a run that is being stopped has ended; returns how it stands then, or after `patience_s`."""
    events, end = list[Event](), now() + patience_s
    while True:
        events += run.poll()
        state = state_of(events, run.alive())
        if state in FINAL or now() >= end:
            return state
        sleep(_POLL_S)


def end_with(folder: Path, reason: str, exit_code: int = INTERRUPTED) -> bool:
    """Says in a run's events that it ended early, if it has not said itself how it ended; returns whether that was needed.

    To be called when none of the run's processes is left. exit_code: INTERRUPTED: somebody stopped it.
    """
    file = folder / EVENTS_FILE
    if run_state(read_events(file) if file.is_file() else ()) in ENDED:
        return False
    log = EventLog(file)
    log(RunFailure(reason=reason, kept=left(folder), exit_code=exit_code))
    return True


# ---------------------------------------------------------------- what is kept


def kept(folder: Path, options: str = "") -> str:
    """Returns a sentence that names what is left of a run that did not end well, and the command that goes on.

    options: of that command, by which it finds the run's server.
    """
    if (folder / "adapter").is_dir() or (folder / CHECKPOINTS).is_dir():
        return (
            f"Kept: the adapter after the last finished round, in {folder / 'adapter'}, and {EVENTS_FILE} beside it. "
            f"{way_on(folder, options)}"
        )
    if not folder.is_dir():
        return f"What there is of it is in {folder}, on the server's machine."
    if not (folder / EVENTS_FILE).is_file():
        return f"No round was finished, and {folder} holds no event of it."
    return f"No round was finished; {folder} holds the events so far."


def left(folder: Path) -> str:
    """Says for a run's last event what is left of the run; whoever reads it elsewhere knows the way on."""
    if (folder / "adapter").is_dir():
        return f"the adapter after the last finished round is kept in {folder.name}/adapter"
    return "no round was finished"


def way_on(folder: Path, options: str = "") -> str:
    """Returns the command that goes on with a run, in words. options: as of `kept`."""
    return f"`edgelam run --resume {shlex.quote(str(folder))}{options}` goes on"


# ---------------------------------------------------------------- finding runs


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """One run in a list of runs; `edgelam runs --json` prints it with these names."""

    run: str
    """The name by which commands find it."""
    state: str
    """As of `state_of`; "unreadable" if its events are damaged."""
    round: int
    """Training rounds that were closed."""
    rounds: int | None
    """Those of its run file; None: it has not said."""
    began: float | None
    """Unix seconds at which it began to wait for nodes; None: it has not begun."""
    seconds: float | None
    """Seconds from then to its end, or so far."""
    note: str
    """The run that it waits for, or why it ended early; "" else."""


def run_line(folder: Path, name: str = "") -> RunLine:
    """Returns what a list of runs says about the run in a folder. name: by which it is found; "": the folder's."""
    file, name = folder / EVENTS_FILE, name or folder.name
    try:
        events = list(read_events(file, _LISTED)) if file.is_file() else []
    except (DataError, OSError) as error:
        return RunLine(
            run=name, state="unreadable", round=0, rounds=None, began=None, seconds=None, note=f"{error!s:.200}"
        )
    state = state_now(folder, events)
    begun = began(events) if any(not isinstance(event, RunWaits) for event in events) else None
    return RunLine(
        run=name,
        state=state,
        round=sum(map(is_training_round, finished_rounds(events))),
        rounds=setting(events, "federation", "rounds"),
        began=begun,
        seconds=round(_end(state, events, file) - begun, 1) if begun is not None else None,
        note=_note(state, events),
    )


def _end(state: str, events: Sequence[Event], file: Path) -> float:
    """Returns the Unix seconds at which a run ended, or now."""
    if state in ENDED:
        return next((event.time or 0.0 for event in reversed(events) if isinstance(event, RunDone | RunFailure)), 0.0)
    return file.stat().st_mtime if state == "killed" else time.time()


def _note(state: str, events: Sequence[Event]) -> str:
    failures = list(of_kind(events, RunFailure))
    return failures[-1].reason if state in EARLY_ENDS else waits_for(events, state)


def waits_for(events: Iterable[Event], state: str) -> str:
    """Returns in words for which run a run waits, and how long it has; "" for one that does not."""
    waits = list(of_kind(events, RunWaits)) if state == "waiting" else []
    if not waits:
        return ""
    return waits[-1].words() + (f", for {human_seconds(waits[-1].seconds)} so far" if waits[-1].seconds else "")


def is_run_folder(folder: Path) -> bool:
    """Returns whether a folder is that of a run, be it one that never began."""
    files = (EVENTS_FILE, _CONFIG)
    return folder.is_dir() and (any((folder / name).is_file() for name in files) or is_alive(folder) is not None)


def run_folders(root: Path = RUNS) -> list[Path]:
    """Returns the folders of runs in a folder, the newest first: by their last event."""
    found = [folder for folder in root.glob("*") if is_run_folder(folder)]
    return sorted(found, key=_last_change, reverse=True)


def newest_run(root: Path = RUNS) -> Path:
    """Returns the folder of the run in `root` whose events are the newest. Raises ConfigError if there is none."""
    found = run_folders(root)
    if not found:
        raise ConfigError(f"no run under {root.absolute()}; name a run's folder")
    return found[0]


def find_run(given: Path, root: Path = RUNS) -> Path:
    """Returns the folder of the run that a user names: by a path, or by the name of a folder in `root`.

    Raises ConfigError if there is none.
    """
    folder = given if given.is_dir() or given.is_absolute() else root / given
    if is_run_folder(folder):
        return folder
    if folder.is_dir():
        raise ConfigError(f"{folder} is not a run's folder: it has no {EVENTS_FILE}")
    names = [each.name for each in run_folders(root)]
    hint = f"; {nearest(given.name, names)}" if names else ""
    raise ConfigError(f"there is no run {given}, neither as a folder nor in {root.absolute()}{hint}")


def _last_change(folder: Path) -> float:
    file = folder / EVENTS_FILE
    return (file if file.exists() else folder).stat().st_mtime
