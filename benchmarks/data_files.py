"""Checks that whatever is in a data file, readers answer with a DataError and its place at worst: 20,000 files, from a seed.

Bytes, JSON, CSV, and Arrow and Parquet tables are made by hypothesis, mostly damaged, and read under every suffix: by a run
with its shapes, with bad lines skipped, as classes, and by `edgelam init`. What was read becomes token ids. --smoke: 20 files.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from benchmarks.common import Figure, main
from tests.data_fuzz import KINDS, READERS, fuzz


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    files = 20 if smoke else options.files
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    read = 0
    for number, kind in enumerate(KINDS):
        tally = fuzz(kind, files // len(KINDS), options.seed + number)
        outcomes += tally.outcomes
        problems += tally.problems
        read += tally.files
    settings = {
        "files": files,
        "seed": options.seed,
        "readers": list(READERS),
        "outcomes": dict(outcomes.most_common()),
    }
    if problems:
        settings["problems"] = problems[:20]
    return settings, [
        Figure("files", read, "files", f"at least {files}", read >= files),
        Figure("anything but a DataError with its place", len(problems), "readings", "none", not problems),
    ]


if __name__ == "__main__":
    main("data_files", measure, add_options)
