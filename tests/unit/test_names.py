"""One name for one thing: no two public classes of the program share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("edgelam_fl", "server", "strategies", "clients", "testbed")
STILL_DOUBLE = {"Member", "Node", "Part", "Site", "Stage"}  # no name is added here


def public_classes() -> dict[str, list[str]]:
    """Class name -> the modules that define a class of this name at their top level."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not file.stem.endswith("_pb2"):
                    found[node.name].append(str(file.relative_to(ROOT)))
    return found


def test_a_public_class_has_a_name_of_its_own() -> None:
    classes = public_classes()
    assert len(classes) > 100, "the search found the program"
    double = {name: modules for name, modules in classes.items() if len(modules) > 1 and name not in STILL_DOUBLE}
    assert double == {}, "rename one of each; docs/glossary.md says which word means what"
