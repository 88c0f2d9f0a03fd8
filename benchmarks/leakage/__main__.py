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
    options, of_part = parser.parse_known_args(arguments)
    if of_part and not options.part:
        parser.error(f"{of_part[0]} belongs to one part: give --part")
    smoke = ["--smoke"] if options.smoke else []
    for part in [options.part] if options.part else PARTS:
        module = importlib.import_module(f"benchmarks.leakage.{part}")
        add_options = getattr(module, "add_options", None)
        command = f"python -m benchmarks.leakage --part {part}"
        common.main(PARTS[part], module.measure, add_options, [*smoke, *of_part], command)
    if not options.smoke:
        known_leakage.write()  # the package ships these numbers


if __name__ == "__main__":
    main()
