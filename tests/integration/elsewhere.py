"""Held-out perplexity of exported adapters, computed by transformers and peft in a process without EdgeLAM-FL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgelam_fl.config import RunConfig
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.held_out import set_aside
from tests.support import WAIT_S

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
    done = subprocess.run(
        [python, str(SCRIPT)], input=json.dumps(task), capture_output=True, text=True, timeout=WAIT_S, check=False, cwd="/",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found
