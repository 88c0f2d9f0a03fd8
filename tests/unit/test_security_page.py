"""SECURITY.md names tests that exist, and every fault of the review has a test that is named by its number."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
NUMBERS = range(1, 21)


@cache
def names() -> tuple[set[str], set[str]]:
    """Returns the names of all files of tests and of all functions of tests."""
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    functions = (re.findall(r"^ *def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files)
    return {file.stem for file in files}, {name for found in functions for name in found}


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_has_a_line_and_a_test(number: int) -> None:
    assert re.search(rf"\bS{number}\b", PAGE)
    named = rf"test_(s\d+_)*s{number}_"
    assert any(re.match(named, name) for name in names()[1]), f"no test is named test_s{number}_..."


def test_the_page_names_tests_that_exist() -> None:
    files, functions = names()
    named = re.findall(r"`(test_\w+?)(\.\.\.)?`", PAGE)
    assert len(named) > 30
    for name, begins in named:
        assert any(function.startswith(name) for function in functions) if begins else name in files | functions, name


@pytest.mark.parametrize("page", ["README.md", "PRIVACY.md", "docs/privacy.md", "docs/deployment.md"])
def test_others_lead_to_it(page: str) -> None:
    assert "SECURITY.md)" in (ROOT / page).read_text(encoding="utf-8")
