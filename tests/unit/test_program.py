"""`edgelam_fl.run`: what a program hears before anything starts, and how a run that fails ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import edgelam_fl
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DataError, RunFailed
from edgelam_fl.federation import program
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import Event, RunFailure

REASON = RunFailure(reason="no device is here", kept="nothing was started", exit_code=2)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Sequence[Path], Path]]:
    """What was started; every run fails at once."""
    runs: list[tuple[RunConfig, Sequence[Path], Path]] = []

    def fails(
        config: RunConfig, data: Sequence[Path], folder: Path, names: Sequence[str], eval_data: Sequence[Path]
    ) -> Iterator[Event]:
        assert names == [file.stem for file in data]
        assert list(eval_data) in ([], [Path("new.txt")])
        runs.append((config, data, folder))
        yield REASON

    monkeypatch.setattr(program, "run_local", fails)
    return runs


def test_a_failed_run_raises_with_its_own_reason_after_its_events(
    started: list[tuple[RunConfig, Sequence[Path], Path]], tiny: ModelSource, tmp_path: Path
) -> None:
    (tmp_path / "ann.txt").write_text("One passage.\n\nAnother one.\n", encoding="utf-8")
    events: list[Event] = []
    small = {"model.name": tiny.name, "federation.rounds": 2, "lora.targets": ("q_proj",)}
    with pytest.raises(RunFailed, match="no device is here; nothing was started") as raised:
        edgelam_fl.run(tmp_path / "ann.txt", overrides=small, folder=tmp_path / "run", on_event=events.append)
    assert (raised.value.exit_code, events) == (2, [REASON])
    [(config, data, folder)] = started
    assert (config.federation.rounds, config.lora.targets) == (2, ("q_proj",))
    assert (config.task.template, config.task.loss_on) == ("plain", "all"), "as the file wants it"
    assert (data, folder) == ([tmp_path / "ann.txt"], tmp_path / "run")


def test_a_run_file_counts_as_it_is(
    started: list[tuple[RunConfig, Sequence[Path], Path]], tiny: ModelSource, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        f'[model]\nname = "{tiny.name}"\n[run]\nout = "{tmp_path}/{{name}}"\n', encoding="utf-8"
    )
    with pytest.raises(RunFailed):
        edgelam_fl.run(["ann.txt", "bob.txt"], tmp_path / "mine.toml", ["federation.rounds=2"], eval_data="new.txt")
    [(config, data, folder)] = started
    assert (config.federation.rounds, config.task.template) == (2, "chat")
    assert (data, folder) == ([Path("ann.txt"), Path("bob.txt")], tmp_path / "mine")


@pytest.mark.parametrize(
    ("data", "overrides", "kind", "says"),
    [
        ([], {}, ConfigError, "data = \\[\\] must name at least one file"),
        (["none.jsonl"], {}, DataError, "none.jsonl"),
        (["a.txt"], {"federation.round": 1}, ConfigError, "did you mean 'federation.rounds'"),
        (["a.txt"], {"federation.rounds": "two"}, ConfigError, "federation.rounds = 'two' must be"),
        (["a.txt"], {"federation.rounds": {1, 2}}, ConfigError, "federation.rounds = {1, 2} is no value of a run file"),
    ],
)
def test_a_mistake_is_raised_before_anything_starts(
    data: list[str], overrides: Mapping[str, Any], kind: type[Exception], says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[RunConfig, Sequence[Path], Path]],
) -> None:  # fmt: skip
    (tmp_path / "a.txt").write_text("One passage.\n\nAnother one.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=says):
        edgelam_fl.run(data, overrides=overrides)
    assert started == []
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
