"""Writes edgelam_fl/privacy/known.json, the numbers that come with the package, from the results of benchmarks.leakage.

    python -m tools.known_leakage            writes the file; needs the models, for their digests
    python -m tools.known_leakage --check    only says whether it is stale; exit status 1 if it is

A host has every attack, so per number of layers the best first guess counts; a figure "first 5" is no first guess.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgelam_fl.privacy.known import SHIPPED, KnownLeakage, as_text

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FIRST_MODEL = "smollm2-135m"  # figures that name no model belong to it
_READ = re.compile(r"(?:(?P<model>[a-z][\w.-]*-[\w.-]+)[,:] )?cut (?P<layers>\d+): (?P<attack>.+)")
_LABELS = re.compile(r"(?:(?P<model>[a-z][\w.-]*-[\w.-]+)[,:] )?back (?P<layers>\d+): (?P<attack>.+)")
_CHANCE = re.compile(r"(?:(?P<model>[a-z][\w.-]*-[\w.-]+)[,:] )?always the commonest public token")


def collected(results: Path, digest_of: Callable[[str], str]) -> list[KnownLeakage]:
    """Returns the numbers per model that result files under `results` hold. `digest_of`: gives the digest of a model's files."""
    figures = _figures(results / "leakage.json")
    read, chance = _best(figures, _READ), _best(figures, _CHANCE)
    labels = _best(_figures(results / "leakage_labels.json"), _LABELS)
    return [
        KnownLeakage(model, digest_of(model), cuts, labels.get(model, {}), chance[model][0])
        for model, cuts in read.items()
    ]


def _figures(file: Path) -> list[Mapping[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))["figures"] if file.is_file() else []


def _best(figures: Iterable[Mapping[str, Any]], pattern: re.Pattern[str]) -> dict[str, dict[int, float]]:
    """Returns the largest share per model and number of layers, of the figures with such a name that are first guesses."""
    found: dict[str, dict[int, float]] = {}
    for figure in figures:
        match = pattern.fullmatch(figure["name"])
        if match is None or re.search(r"first \d", figure["name"]):
            continue
        words = match.groupdict()
        shares = found.setdefault(words["model"] or FIRST_MODEL, {})
        layers, share = int(words.get("layers") or 0), round(figure["value"] / 100, 4)
        shares[layers] = max(share, shares.get(layers, 0.0))
    return {model: dict(sorted(shares.items())) for model, shares in found.items()}


def text_of_results() -> str:
    """Returns what known.json has to hold by the present results."""
    from edgelam_fl.model.source import find_model

    return as_text(collected(RESULTS, lambda name: find_model(name).leakage_key))


def write() -> None:
    """Writes known.json."""
    SHIPPED.write_text(text_of_results(), encoding="utf-8")


def main() -> int:
    if "--check" not in sys.argv[1:]:
        write()
        return 0
    stale = SHIPPED.read_text(encoding="utf-8") != text_of_results()
    print("stale" if stale else "up to date")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
