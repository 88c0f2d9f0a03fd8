"""Runs one part of the measurements of what leaks, or all parts."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from benchmarks import common
from benchmarks.leakage import PARTS
from tools import known_leakage


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leakage", description=__doc__)
    parser.add_argument("--part", choices=list(PARTS), help="run this part only")
    parser.add_argument("--smoke", action="store_true", help="the smallest run of each part; writes no result")
    options = parser.parse_args(arguments)
    for part in [options.part] if options.part else PARTS:
        measure = importlib.import_module(f"benchmarks.leakage.{part}").measure
        command = f"python -m benchmarks.leakage --part {part}"
        common.main(PARTS[part], measure, arguments=["--smoke"] if options.smoke else [], command=command)
    if not options.smoke:
        known_leakage.write()  # the package ships these numbers


if __name__ == "__main__":
    main()
