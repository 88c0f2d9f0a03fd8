"""Measured shares of a text that hosts can read with a model: without an attack, and without the model.

The numbers of built-in models are in this package (known.json, written by `python -m tools.known_leakage` from the results of
the benchmark); what `edgelam leakage` measures for other models is kept in the cache folder of this machine. Knows neither
run files nor plans (`limits` judges them), and imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from edgelam_fl.files import cache_folder, write_atomically

SHIPPED = Path(__file__).with_name("known.json")


@dataclass(frozen=True)
class KnownLeakage:
    """The measurement of one model. Shares are between 0 and 1."""

    model: str
    """Name in run files."""
    digest: str
    """What was measured, as `ModelSource.leakage_key`: the SHA-256 of the weights and, after a colon, of the tokenizer's files.

    Without a tokenizer, as older versions wrote it, it means these weights with any."""
    read: Mapping[int, float]
    """Share of a text's tokens that the best attack reads from the hidden states, by layers on the device."""
    labels: Mapping[int, float]
    """Share of the labels that a host solves from their gradient, by layers at the back; empty: not measured."""
    chance: float
    """Share of the tokens that the commonest public token has: what an attacker gets without seeing anything."""

    def share_read(self, front: int) -> float:
        """Returns the share at `front` layers; between measured numbers of layers, that of the fewer, which leak more.

        Below the smallest measured number it is 1.
        """
        return self.read.get(max((cut for cut in self.read if cut <= front), default=-1), 1.0)

    def share_of_labels(self, back: int) -> float | None:
        """Returns the share of the labels at `back` layers, in the same way; None if it was not measured."""
        return self.labels.get(max((cut for cut in self.labels if cut <= back), default=-1))

    def front_for(self, limit: float) -> int | None:
        """Returns the fewest layers from which on no measured number leaks more than `limit`; None if all do."""
        cuts = sorted(self.read)
        below = [cut for cut in cuts if all(self.read[other] <= limit for other in cuts if other >= cut)]
        return below[0] if below else None


def known_leakage(name: str, digest: str = "") -> KnownLeakage | None:
    """Returns what is known about a model; None: it was not measured, neither for this package nor on this machine.

    digest: the model's `leakage_key`; empty: its files were not looked at, and the name alone says which model is meant.
    """
    weights = digest.partition(":")[0]
    for known in shipped():
        if known.digest in (digest, weights) or (not digest and known.model == name):
            return known
    return (_stored(digest) or _stored(weights)) if digest else None


@cache
def shipped() -> tuple[KnownLeakage, ...]:
    """Returns the numbers that come with this package."""
    return tuple(map(_from_json, json.loads(SHIPPED.read_text(encoding="utf-8"))))


def as_text(known: list[KnownLeakage]) -> str:
    """Writes numbers as known.json holds them."""
    return json.dumps([asdict(each) for each in known], indent=1) + "\n"


def store(known: KnownLeakage) -> Path:
    """Keeps what was measured on this machine; returns the file.

    Beside an older measurement, the larger share counts per number of layers: an attacker chooses the text to learn from.
    """
    file, older = _place(known.digest), _stored(known.digest)
    if older is not None:
        read = {
            cut: max(each.read.get(cut, 0.0) for each in (known, older)) for cut in sorted({*known.read, *older.read})
        }
        known = replace(known, read=read)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(known), indent=1))
    return file


def _stored(digest: str) -> KnownLeakage | None:
    try:
        return _from_json(json.loads(_place(digest).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # absent, or of another version: then it is not known
        return None


def _place(digest: str) -> Path:
    weights, _, tokenizer = digest.partition(":")
    return cache_folder() / "leakage" / f"{'-'.join(filter(None, (weights[:24], tokenizer[:16])))}.json"


def _from_json(values: Mapping[str, Any]) -> KnownLeakage:
    """Reads one model's numbers. JSON has no keys that are numbers."""
    read, labels = ({int(cut): float(share) for cut, share in values[key].items()} for key in ("read", "labels"))
    return KnownLeakage(values["model"], values["digest"], read, labels, values["chance"])
