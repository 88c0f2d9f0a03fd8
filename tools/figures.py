"""Fills the marked numbers of pages from the files under benchmarks/results. Knows no page and no number itself.

    python tools/figures.py README.md docs/*.md            lists stale pages; exit status 1 if there are any
    python tools/figures.py --write README.md docs/*.md    fills them

A number in running text has invisible markers around it:

    <!-- figure: demo; whole command; {value:.0f} s -->284 s<!-- /figure -->

A marker has three parts: the result's name (benchmarks/results/NAME.json), the figure's name, the form. A figure's name may
be a pattern (`*: memory of *`); "settings.KEY" reads a setting instead. A form is a Python format string over these words:

    value         the figure's number, or the setting    thousands, millions, gigas, mebis    value / 1e3, 1e6, 1e9, 2^20
    percent       100 * value                            unit                                 the figure's unit
    lowest, highest    of all matching figures           off_percent    largest distance from 1 of all matches, %, rounded up

Lines of a program's output are quoted as a block; each pattern selects the first line that matches it:

    <!-- lines: demo.txt; data:*; *round 1 of 3 took*; *done, 3 rounds* -->
    (a fenced block)
    <!-- /lines -->
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_FIGURE = re.compile(r"<!-- figure: ([^;]+); ([^;]+); (.+?) -->(.*?)<!-- /figure -->", re.DOTALL)
_LINES = re.compile(r"<!-- lines: ([^;]+); (.+?) -->\n(.*?)<!-- /lines -->", re.DOTALL)


class StaleMarker(Exception):
    """A marker that cannot be filled. The message names the marker and what is missing."""


def filled(page: str, results: Path = RESULTS) -> str:
    """Returns the page with every marked number and block as the result files have them. Raises StaleMarker."""

    def number(match: re.Match[str]) -> str:
        result, name, form, _ = (part.strip() for part in match.groups())
        return f"<!-- figure: {result}; {name}; {form} -->{_number(results, result, name, form)}<!-- /figure -->"

    def lines(match: re.Match[str]) -> str:
        file, patterns = match[1].strip(), [part.strip() for part in match[2].split(";")]
        quoted = "\n".join(_quoted(results / file, patterns))
        return f"<!-- lines: {file}; {'; '.join(patterns)} -->\n```text\n{quoted}\n```\n<!-- /lines -->"

    return _LINES.sub(lines, _FIGURE.sub(number, page))


def without_marked(page: str) -> str:
    """Returns the page without its marked numbers and blocks, so with the text that no result file is checked against."""
    return _LINES.sub("", _FIGURE.sub("", page))


def marked(page: str) -> list[tuple[str, str]]:
    """Returns (result, figure's name or pattern) of every marked number."""
    return [(match[1].strip(), match[2].strip()) for match in _FIGURE.finditer(page)]


def matching(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns the figures whose names match a name or pattern."""
    return [figure for figure in result["figures"] if fnmatch.fnmatchcase(figure["name"], name)]


def _number(results: Path, result: str, name: str, form: str) -> str:
    try:
        content = json.loads((results / f"{result}.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StaleMarker(f"{result}; {name}: there is no {result}.json under {results}") from error
    if name.startswith("settings."):
        return form.format(value=content["settings"][name.removeprefix("settings.")])
    found = matching(content, name)
    if not found:
        raise StaleMarker(f"{result}; {name}: {result}.json has no such figure")
    values = [figure["value"] for figure in found]
    words = {
        "lowest": min(values),
        "highest": max(values),
        "off_percent": math.ceil(100 * max(abs(value - 1) for value in values)),
    }
    if len(found) == 1:
        value = values[0]
        words |= {
            "value": value, "percent": 100 * value, "unit": found[0]["unit"], "thousands": value / 1e3,
            "millions": value / 1e6, "gigas": value / 1e9, "mebis": value / 2**20,
        }  # fmt: skip
    try:
        return form.format(**words)
    except KeyError as error:
        raise StaleMarker(f"{result}; {name}: {len(found)} figures match, but the form {form} needs {error}") from error


def _quoted(file: Path, patterns: Iterable[str]) -> list[str]:
    lines = [line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()]
    quoted = []
    for pattern in patterns:
        line = next((line for line in lines if fnmatch.fnmatchcase(line, pattern)), None)
        if line is None:
            raise StaleMarker(f"{file.name}; {pattern}: no line of {file} matches")
        quoted.append(line)
    return quoted


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/figures.py", description="Fills or checks the marked numbers of pages."
    )
    parser.add_argument("--write", action="store_true", help="fill the pages instead of checking them")
    parser.add_argument("pages", nargs="+", type=Path)
    options = parser.parse_args()
    stale = 0
    for page in options.pages:
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text)
        except StaleMarker as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 2
        if new != text:
            stale += 1
            print(f"{page}: {'filled' if options.write else 'stale'}")
            if options.write:
                page.write_text(new, encoding="utf-8")
    return 1 if stale and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
