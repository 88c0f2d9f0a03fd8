"""Waits: when they say that they go on, and where the words go."""

from __future__ import annotations

import io
import re
import threading
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from edgelam_fl.telemetry.waiting import Reminder, SignTiming, waiting
from tests.support import WAIT_S


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def said_at(signs: Reminder, clock: Clock, text: str, until_s: int) -> list[int]:
    """Returns the seconds at which `text` was due, asked for every second."""
    found = []
    while clock.now_s < until_s:
        clock.now_s += 1
        if signs.is_due(text):
            found.append(int(clock.now_s))
    return found


def test_a_wait_is_said_after_four_seconds_and_then_every_ten() -> None:
    signs = Reminder(SignTiming(now=(clock := Clock())))
    assert said_at(signs, clock, "loading", 30) == [4, 14, 24]
    signs.postpone()
    assert said_at(signs, clock, "loading", 50) == [40, 50]


def test_what_does_not_change_for_hours_is_said_ever_more_rarely() -> None:
    signs = Reminder(SignTiming(now=(clock := Clock())))
    said = said_at(signs, clock, "waits for run one", 24 * 3600)
    assert len(said) < 360
    assert max(after - before for before, after in pairwise(said)) < 1500
    said = said_at(signs, clock, "step 1 of 3", 24 * 3600 + 1500)
    assert said[-1] - said[-2] < 35, "with other words it begins anew"


class Heard(io.StringIO):
    """A text that says when `words` came."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words, self.came = words, threading.Event()

    def write(self, text: str) -> int:
        if self._words in text:
            self.came.set()
        return super().write(text)


def quick() -> SignTiming:
    clock = iter(range(1000))
    return SignTiming(first_s=0.001, every_s=0.0, now=lambda: float(next(clock)))


def test_without_a_terminal_a_wait_prints_plain_lines_with_the_newest_words() -> None:
    heard = Heard("reading [b]")
    with waiting(Console(file=heard, width=20), "starting", quick()) as wait:
        wait.update("reading [b], which is long")
        assert heard.came.wait(WAIT_S)
    lines = heard.getvalue().splitlines()
    assert lines[-2].startswith("reading [b], which is long, ")
    assert lines[-2].endswith(" so far")
    assert lines[-1].startswith("reading [b], which is long took ")


def test_a_wait_that_fails_leaves_the_last_word_to_the_error() -> None:
    heard = Heard("reading")
    with suppress(ValueError), waiting(Console(file=heard, width=20), "reading", quick()):
        assert heard.came.wait(WAIT_S)
        raise ValueError
    assert heard.getvalue().splitlines()[-1].endswith(" so far")


def test_on_a_terminal_a_wait_is_a_line_that_goes_away() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    with waiting(console, "starting") as wait:
        wait.update("handing [over]")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "handing [over]" in shown
    assert shown.endswith("\x1b[2K"), "the line is cleared"


@pytest.mark.parametrize("stderr", [False, True])
def test_what_a_command_was_asked_for_stays_in_its_own_stream(stderr: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """As with stdout in a file and messages on a terminal."""
    console = Console(file=io.StringIO(), force_terminal=True, stderr=stderr)
    with waiting(console, "loading"):
        print("the answer")
    assert ("the answer" in capsys.readouterr().out) == stderr


def test_no_command_waits_in_a_way_that_only_a_terminal_shows() -> None:
    """As rich's own status does."""
    sources = (Path(__file__).parents[2] / "edgelam_fl").rglob("*.py")
    assert [file.name for file in sources if re.search(r"(console|messages)\.status\(", file.read_text())] == []
