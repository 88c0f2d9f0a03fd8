"""The recorder of silences: what it takes for a sign of life, and for news."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.silence import Piece, Record, Recorder, words_of


def test_the_longest_silence_may_be_before_between_or_after() -> None:
    pieces = [Piece(2.0, "reading\n"), Piece(9.0, "done\n")]
    assert Record(0, 9.5, pieces).longest_silence() == (7.0, "reading")
    assert Record(0, 20.0, pieces).longest_silence() == (11.0, "done")
    assert Record(0, 9.5, pieces[1:]).longest_silence() == (9.0, "")
    assert Record(0, 3.0, []).longest_silence() == (3.0, "")


def test_clocks_and_spinners_are_signs_of_life_but_no_news() -> None:
    pieces = [Piece(n / 4, f"\x1b[2K\r\u280b reading 0:00:{n:02d}") for n in range(40)]
    record = Record(0, 10.0, [*pieces, Piece(9.9, "round 1 of 2: step 3 of 6, about 40 s left, 12 s\n")])
    assert record.longest_silence()[0] == 0.25
    assert record.longest_without_news() == (9.9, "reading")
    assert words_of(record.text)[-1].endswith("round 1 of 2: step 3 of 6,")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_command_is_recorded_on_a_terminal_or_without(tmp_path: Path, terminal: bool) -> None:
    text = "import os, sys; print(sys.stdout.isatty(), os.getcwd()); print('end', file=sys.stderr); sys.exit(3)"
    record = Recorder([sys.executable, "-c", text], terminal=terminal, cwd=tmp_path).record()
    assert record.status == 3
    assert record.text.split() == [str(terminal), str(tmp_path), "end"]
    assert 0 < record.pieces[0].at_s <= record.seconds
