"""Measures how long a command leaves its user without a sign of life: on a terminal, and with its output in a file.

Also measures what the signs of life of a node cost it. Records when each piece of output comes, from the first moment of the process to its last. Two numbers per command: the longest time
without any output, and the longest time in which the words stayed the same, whatever clocks and spinners did. --smoke: one command
that needs no model.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, main
from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.telemetry.progress import write_node_progress
from edgelam_fl.wire.progress import as_message

EDGELAM = str(Path(sys.executable).with_name("edgelam"))
TERMINAL_BAR_S, FILE_BAR_S = 5.0, 12.0  # the second: lines come every 10 s
_ROWS, _COLUMNS = 40, 100
_LOOK_S, _LIMIT_S = 0.5, 1800.0
_STATUSES = {"doctor": (0, 3)}  # 3: something is wrong with this machine, as a port that is taken
_MATRIX = "../../benchmarks/matrices/smoke.toml"  # from the folder in which the commands run
_MOVING = re.compile(
    "\x1b\\[[0-9;?]*[A-Za-z]"  # where the cursor goes, and colours
    "|[\u2800-\u28ff\u2501\u2578\u257a]"  # spinners and bars
    "|[0-9]+:[0-9]{2}:[0-9]{2}"  # clocks
    "|, [0-9]+ s$|, [0-9.]+ s so far|^ *[0-9]+ s  |about [0-9a-z ]+ left( in the run)?|\r",
    re.MULTILINE,
)
RUN_FILE = """\
[federation]
rounds = 2
local_steps = 4
batch_size = 4
[task]
max_tokens = 96
"""


@dataclass(frozen=True)
class Piece:
    """A piece of output: when it came, in seconds since the process was started."""

    at_s: float
    text: str


@dataclass(frozen=True)
class Record:
    """One command from its first moment to its last."""

    status: int
    seconds: float
    pieces: Sequence[Piece]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def longest_silence(self) -> tuple[float, str]:
        """Returns the seconds of the longest time without output, and the last words before it."""
        return _longest([(piece.at_s, piece.text) for piece in self.pieces], self.seconds)

    def longest_without_news(self) -> tuple[float, str]:
        """Returns the seconds of the longest time in which the words stayed the same, and these words."""
        news, said = list[tuple[float, str]](), set[str]()
        for piece in self.pieces:
            new = [words for words in words_of(piece.text) if words not in said]
            if new:
                said = set(words_of(piece.text))
                news.append((piece.at_s, "\n".join(new)))
        return _longest(news, self.seconds)


def _longest(moments: Sequence[tuple[float, str]], seconds: float) -> tuple[float, str]:
    begins, ends = [(0.0, ""), *moments], [*(at_s for at_s, _ in moments), seconds]
    return max(
        ((end - begin, (words_of(text) or [""])[-1]) for (begin, text), end in zip(begins, ends, strict=True)),
        key=lambda gap: gap[0],
    )


def words_of(text: str) -> list[str]:
    """Returns the lines of a piece of output without what moves by itself."""
    return [line for each in text.splitlines() if (line := " ".join(_MOVING.sub(" ", each).split()))]


# ---------------------------------------------------------------- recording


class Recorder:
    """A command whose output is recorded while it runs."""

    def __init__(
        self, command: Sequence[str], *, terminal: bool, cwd: Path, environment: Mapping[str, str] = {}
    ) -> None:
        """Starts the command. `terminal`: its output goes to a terminal of its own; else to a pipe."""
        self._read, write = pty.openpty() if terminal else os.pipe()
        if terminal:
            ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
        self._began, self._pieces = time.monotonic(), list[Piece]()
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=write, stderr=write, start_new_session=True,
            env={**kept, "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(write)

    def take(self) -> bool:
        """Takes what has come, and waits a little for it; returns whether more may come."""
        ready, _, _ = select.select([self._read], [], [], _LOOK_S)
        if not ready:
            return True
        try:
            data = os.read(self._read, 1 << 16)
        except OSError:  # a terminal that nobody writes to any more
            data = b""
        if data:
            self._pieces.append(Piece(time.monotonic() - self._began, data.decode(errors="replace")))
        return bool(data)

    def record(self, limit_s: float = _LIMIT_S) -> Record:
        """Takes everything until the command ends, and returns the whole record. Ends a command that takes too long."""
        while self.take():
            if time.monotonic() - self._began > limit_s:
                self.process.terminate()
        status = self.process.wait()
        os.close(self._read)
        return Record(status, time.monotonic() - self._began, tuple(self._pieces))


# ---------------------------------------------------------------- commands


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    folder = Path("runs/benchmark-silence-smoke" if smoke else "runs/benchmark-silence").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    figures, told, busy = list[Figure](), dict[str, Any](), round(os.getloadavg()[0], 1)
    for name, terminal, arguments in _smoke_commands(folder) if smoke else _commands(folder):
        record = Recorder(
            [EDGELAM, *arguments], terminal=terminal, cwd=folder, environment={"HF_HUB_OFFLINE": "1"}
        ).record()
        if record.status not in _STATUSES.get(name, (0,)):
            raise SystemExit(
                f"`edgelam {' '.join(arguments)}` ended with status {record.status}: {record.text[-2000:]}"
            )
        where = f"{name}, {'terminal' if terminal else 'file'}"
        (silent_s, before), (same_s, words) = record.longest_silence(), record.longest_without_news()
        bar_s = TERMINAL_BAR_S if terminal else FILE_BAR_S
        figures += [
            Figure(f"{where}: longest silence", round(silent_s, 2), "s", f"at most {bar_s:g} s", silent_s <= bar_s),
            Figure(f"{where}: longest with the same words", round(same_s, 2), "s"),
            Figure(f"{where}: whole command", round(record.seconds, 1), "s"),
        ]
        said = {"silent_after": before, "same_words": words}
        told[where] = {"command": ["edgelam", *arguments]} | {
            key: text.replace(f"{folder}/", "").replace(str(folder), ".").replace(str(Path.home()), "~")
            for key, text in said.items()
        }
    figures += _costs(folder, 200 if smoke else 5000)
    shutil.rmtree(folder, ignore_errors=True)
    return {"run_file": RUN_FILE, "processes_that_computed_beside": busy, "commands": told}, figures


def _costs(folder: Path, signs: int) -> list[Figure]:
    """Measures what the signs of a node cost, each of which it gives once per second at most."""
    said = [
        NodeProgress(doing="training", step=n, steps=signs, unit=1, units=4, loss=2.5, tokens=80 * n)
        for n in range(signs)
    ]
    ways: dict[str, Callable[[NodeProgress], object]] = {
        "in a beat": lambda one: as_message(one).SerializeToString(),
        "in a file": lambda one: write_node_progress(folder, "run/1/1/device-1", one),
    }
    found = []
    for name, way in ways.items():
        began = time.process_time()
        for one in said:
            way(one)
        cost_s = (time.process_time() - began) / signs
        bar = "at most a thousandth of a core"
        found.append(Figure(f"CPU of a node's sign {name}", round(1e6 * cost_s, 1), "us", bar, cost_s <= 1e-3))
    return found


def _smoke_commands(folder: Path) -> Iterator[tuple[str, bool, list[str]]]:
    for terminal in (True, False):
        yield "help", terminal, ["--help"]


def _commands(folder: Path) -> Iterator[tuple[str, bool, list[str]]]:
    """Yields (name, whether on a terminal, arguments) of each command; a later one may use what an earlier one left."""
    (folder / "mine.toml").write_text(RUN_FILE, encoding="utf-8")
    pairs = [{"question": f"What is {n} plus {n}?", "answer": f"The sum is {2 * n}."} for n in range(60)]
    (folder / "ann.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for terminal in (True, False):
        out = f"run-{'terminal' if terminal else 'file'}"
        yield "doctor", terminal, ["doctor"]
        yield "run", terminal, ["run", "mine.toml", "--local", "1", "--data", "ann.jsonl", "--out", out]
        yield "chat", terminal, ["chat", out, "--prompt", "What is 3 plus 3?", "--max-tokens", "24"]
        yield "report", terminal, ["report", out]
    for terminal in (True, False):
        yield "bench", terminal, ["bench", _MATRIX, "--out", f"bench-{'terminal' if terminal else 'file'}"]


if __name__ == "__main__":
    main("silence", measure)
