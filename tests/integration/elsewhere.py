"""Held-out perplexity of exported adapters, computed by transformers and peft in a process without EdgeLAM-FL.

That process imports them for seconds, so it stays, for whoever asks next, until this one ends.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from edgelam_fl.config import RunConfig
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.held_out import set_aside

SCRIPT = Path(__file__).with_name("plain_perplexity.py")
Pairs = Mapping[str, Sequence[tuple[str, str]]]


def held_out_pairs(files: Mapping[str, Path], config: RunConfig) -> Pairs:
    """Returns what each device measures with, from its file of questions and answers."""
    return {
        name: [
            (str(prompt), str(answer))
            for prompt, answer in set_aside(read_pairs(file, "question", "answer"), config.data.held_out)[1]
        ]
        for name, file in files.items()
    }


def elsewhere(
    model: Path,
    tokenizer: Path,
    adapters: Mapping[str, Path],
    config: RunConfig,
    pairs: Pairs,
    python: str = sys.executable,
) -> dict[str, dict[str, float]]:
    """Returns the perplexity per adapter and device, with "" for the model alone. model: its folder, or a file of torch's.

    python: an interpreter that has transformers and peft, and perhaps no EdgeLAM-FL.
    """
    task = {
        "model": str(model),
        "tokenizer": str(tokenizer),
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "max_tokens": config.task.max_tokens,
        "threads": 1,
        "pairs": dict(pairs),
    }
    process, log = _process(python)
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # its log says why
        print(json.dumps(task), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer, log.read_text(encoding="utf-8")[-2000:]
    found: dict[str, dict[str, float]] = json.loads(answer)
    return found


@cache
def _process(python: str) -> tuple[subprocess.Popen[str], Path]:
    """Starts the process that answers; returns it and what it says besides."""
    folder = tempfile.TemporaryDirectory(prefix="edgelam-elsewhere-")
    log = Path(folder.name) / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [python, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/",
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip

    def end() -> None:
        process.communicate()
        folder.cleanup()

    atexit.register(end)
    return process, log
