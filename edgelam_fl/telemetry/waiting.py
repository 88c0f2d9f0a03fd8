"""Shows that something takes time, and how long it has taken: a moving line on a terminal, a plain line now and then elsewhere.

Knows neither what takes the time nor how long it will. A wait of a few seconds prints nothing where there is no terminal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from edgelam_fl.telemetry.human import human_seconds

FIRST_SIGN_S = 4.0
SIGNS_S = 10.0
_PATIENCE = 60  # a thing that takes hours gets a line per this part of the time that it has taken


@dataclass(frozen=True, slots=True, kw_only=True)
class SignTiming:
    """Times at which a wait says that it goes on, and its clock."""

    first_s: float = FIRST_SIGN_S
    every_s: float = SIGNS_S
    now: Callable[[], float] = time.monotonic


DEFAULT_SIGNS = SignTiming()


class Reminder:
    """Decides when a thing that goes on says so. For one thread."""

    def __init__(self, timing: SignTiming = DEFAULT_SIGNS) -> None:
        self._timing, self._began_s, self._changed_s = timing, timing.now(), timing.now()
        self._next_s, self._text = self._began_s + timing.first_s, ""

    @property
    def seconds(self) -> float:
        """Returns the seconds since it began."""
        return self._timing.now() - self._began_s

    def postpone(self) -> None:
        """Takes note that something else was said."""
        self._changed_s = self._timing.now()
        self._next_s = self._changed_s + self._timing.every_s

    def is_due(self, text: str) -> bool:
        """Returns whether to say `text` now. One that does not change is said ever more rarely."""
        now = self._timing.now()
        if text != self._text:
            self._text, self._changed_s = text, now
        if now < self._next_s:
            return False
        self._next_s = now + max(self._timing.every_s, (now - self._changed_s) / _PATIENCE)
        return True


class Waiting:
    """A wait that goes on, with the words that it is shown with."""

    def __init__(self, text: str, show: Callable[[str], None]) -> None:
        self.text, self._show = text, show
        self.ended_well = False

    def update(self, text: str) -> None:
        """Shows other words from now on."""
        self.text = text
        self._show(text)


@contextmanager
def waiting(console: Console, text: str, timing: SignTiming = DEFAULT_SIGNS) -> Iterator[Waiting]:
    """Shows `text` and the time that the block has taken, until it ends. `timing`: of the lines where there is no terminal."""
    if console.is_terminal:
        with _moving(console) as bar:
            task = bar.add_task(text, total=None)
            yield Waiting(text, lambda words: bar.update(task, description=words))
        return
    over, wait = threading.Event(), Waiting(text, lambda words: None)
    thread = threading.Thread(target=_say_now_and_then, args=(console, wait, over, timing), name="signs", daemon=True)
    thread.start()
    try:
        yield wait
        wait.ended_well = True
    finally:
        over.set()
        thread.join()


def _moving(console: Console) -> Progress:
    text = TextColumn("{task.description}", markup=False)
    takes_output = not console.stderr  # else what a command was asked for would go where its messages go
    return Progress(
        SpinnerColumn(), text, TimeElapsedColumn(), console=console, transient=True, redirect_stdout=takes_output
    )


def _say_now_and_then(console: Console, wait: Waiting, over: threading.Event, timing: SignTiming) -> None:
    signs, has_said = Reminder(timing), False
    while not over.wait(min(1.0, timing.first_s) or 1.0):
        if signs.is_due(wait.text):
            has_said = True
            _print(console, f"{wait.text}, {human_seconds(signs.seconds)} so far")
    # Said, so that the next wait's first sign does not come too late after this one's last; after an error, its message does that.
    if has_said and wait.ended_well:
        _print(console, f"{wait.text} took {human_seconds(signs.seconds)}")


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
