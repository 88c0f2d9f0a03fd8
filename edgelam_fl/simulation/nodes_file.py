"""A simulated federation's file, which names its nodes. Imports no torch: `edgelam bench` writes it, the fabric reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SimulatedNode:
    """A node as a federation's file has it. Paths are relative to that file."""

    name: str
    data: str = ""  # file of a device's examples; empty: an edge server
    held_out: str = ""  # file of the examples to measure on; empty: a share of its data (data.held_out)
    attack: str = ""  # key of edgelam_fl.simulation.attacks.ATTACKS, for each update that it sends; empty: none


def write_federation(folder: Path, nodes: Iterable[SimulatedNode]) -> None:
    """Writes the nodes into a federation's file, in the order of their numbers; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"nodes": [vars(node) for node in nodes]}, indent=1)
    (folder / "federation.json").write_text(text + "\n", encoding="utf-8")


def read_federation(folder: Path) -> list[SimulatedNode]:
    """Reads the nodes that `write_federation` wrote. Raises DataError if the file describes none."""
    try:
        entries = json.loads((folder / "federation.json").read_text(encoding="utf-8"))["nodes"]
        return [SimulatedNode(**entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{folder / 'federation.json'} does not describe a federation: {error}", "unreadable"
        ) from error
