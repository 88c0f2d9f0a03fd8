"""One name for one thing: no two public classes of the program share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
FOLDERS = ("edgelam_fl", "server", "strategies", "clients", "testbed")


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
    double = {name: modules for name, modules in classes.items() if len(modules) > 1}
    assert double == {}, "rename one of each; docs/glossary.md says which word means what"


def test_the_glossary_has_each_word_once_with_a_package_that_exists() -> None:
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in table if row[0] not in ("word", "---")]
    words = [word for row in rows for word in row[0].split(", ")]
    assert len(words) > 60
    assert len(set(words)) == len(words)
    for _, meaning, places in rows:
        assert meaning
        for place in places.split(", "):
            assert (ROOT / place.strip("`")).is_dir(), place
