"""What `edgelam_fl` promises to keep, name by name; the page of the Python API documents all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgelam_fl

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
PUBLIC = {
    "EdgelamError", "Result", "RunConfig", "__version__", "open_result", "parse_run_file", "read_events", "read_run_file",
    "run", "run_local",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(edgelam_fl.__all__) == PUBLIC
    assert all(getattr(edgelam_fl, name) is not None for name in PUBLIC)


def test_each_is_documented() -> None:
    documented = re.findall(r"^::: (\S+)$", PAGE, flags=re.MULTILINE)
    assert {name.rpartition(".")[2] for name in documented} >= PUBLIC - {"__version__"}


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = edgelam_fl.Nothing


def test_an_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'flwr', 'pydantic'}"
    program = f"import sys, edgelam_fl; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
