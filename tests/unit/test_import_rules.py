"""Modules are imported by name in few places: what is imported there is listed or checked. import-linter sees the rest."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("edgelam_fl", "server", "clients", "strategies")
ALLOWED = {
    "edgelam_fl/__init__.py",  # the public names, from the modules of a literal table
    "edgelam_fl/federation/flower_app.py",
    "edgelam_fl/model/value_ends.py",  # a task's own network, by the names of the literal table in tasks/kinds.py
    "edgelam_fl/tasks/kinds.py",  # of a literal table that is read where there is no torch
    "edgelam_fl/tasks/docstrings.py",  # the demo's data are the standard library's modules, by the names of a literal list
    "edgelam_fl/tasks/metrics.py",  # metrics of a run's own, from modules that the node's operator allowed
    "strategies/registry.py",
}


def test_modules_are_imported_by_name_in_few_places() -> None:
    files = [file for folder in PACKAGES for file in (ROOT / folder).rglob("*.py")]
    found = {
        str(file.relative_to(ROOT))
        for file in files
        if "import_module(" in file.read_text() or "__import__(" in file.read_text()
    }
    assert found == ALLOWED


def test_what_every_test_imports_brings_no_torch() -> None:
    """A test of plain data starts in a second; PyTorch and Flower would take several."""
    code = "import sys, tests.conftest, tests.unit.conftest; print(sorted({'torch', 'transformers', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_neither_the_commands_nor_the_server_bring_torch() -> None:
    """Each of their processes would wait a second for it, and keep 130 MB of it, without a use."""
    code = "import sys, edgelam_fl.federation.demos, edgelam_fl.bench.command, server.app\n"
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_package_says_its_duty() -> None:
    packages = [file for folder in PACKAGES for file in (ROOT / folder).rglob("__init__.py")]
    assert len(packages) > 20
    silent = [file for file in packages if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]
    assert silent == []
