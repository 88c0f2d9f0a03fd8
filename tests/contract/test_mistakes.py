"""Mistakes that people make end in one line, before anything starts; `--explain` says of each what a run says."""

from __future__ import annotations

import multiprocessing.process
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.mistakes import MISTAKES, Mistake, answers, prepare
from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.federation import template
from edgelam_fl.model.source import ModelSource


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets no process begin: what tokenizes does so in this one."""

    def started(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a process was started")

    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    monkeypatch.setattr(subprocess.Popen, "__init__", started)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", started)
    monkeypatch.setattr(template, "can_fork", lambda: False)
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def answer(capsys: pytest.CaptureFixture[str], typed: str, *more: str) -> str:
    """Types a command, and returns the one line that it answers."""
    capsys.readouterr()
    status = exit_code(app, "edgelam", [*shlex.split(typed), *more])
    said = capsys.readouterr()
    assert status == 2, said
    assert said.out == ""
    (line,) = answers(said.err)
    assert line.startswith("edgelam: ")
    return line


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_answered_in_one_line_and_starts_nothing(
    mistake: Mistake, tiny: ModelSource, capsys: pytest.CaptureFixture[str]
) -> None:
    is_run = mistake.typed.startswith("run ") and mistake.takes_model
    model = ("--set", f"model.name={tiny.name}") if is_run else ()
    said = answer(capsys, mistake.typed, *model)
    assert mistake.says in said
    assert said.count(mistake.says) == 1
    if mistake.is_explained:
        assert answer(capsys, mistake.typed, *model, "--explain") == said


def test_each_mistake_is_another() -> None:
    assert (
        len({mistake.typed for mistake in MISTAKES})
        == len({mistake.name for mistake in MISTAKES})
        == len(MISTAKES)
        >= 25
    )
