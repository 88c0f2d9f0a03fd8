"""One federation for all tests of this folder, the runs that several of them look at, and commands in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.docstrings import write_device_files
from tests.integration.federation import Federation, Run, config_of

PAIRS = 20  # of each device


@dataclass(frozen=True)
class Done:
    """What a command that ran in this process left."""

    returncode: int
    stdout: str
    stderr: str


Edgelam = Callable[..., Done]


@pytest.fixture
def edgelam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Edgelam:
    """Runs a command in this process, in an empty folder; `typed` is its standard input."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str, typed: str = "") -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        status = exit_code(app, "edgelam", arguments)
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def docstring_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo's data: a file a device."""
    return write_device_files(tmp_path_factory.mktemp("docstrings"), 3)


@pytest.fixture(scope="session")
def few_pairs(docstring_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PAIRS of each device's pairs, spread over its modules."""
    folder, files = tmp_path_factory.mktemp("few-pairs"), {}
    for whole in docstring_files:
        lines = whole.read_text(encoding="utf-8").splitlines()
        chosen = [line for line in lines if len(json.loads(line)["answer"]) < 120]
        files[whole.stem] = folder / whole.name
        files[whole.stem].write_text("\n".join(chosen[:: len(chosen) // PAIRS][:PAIRS]) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def federation(few_pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"), few_pairs)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def averaged(federation: Federation, tiny: ModelSource) -> Run:
    """Two rounds of the tiny model with FedAvg."""
    return federation.run("averaged", config_of(tiny.name))
