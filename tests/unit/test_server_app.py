"""The ServerApp's door: which of its jobs a run config asks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import ConfigError, UsageError
from edgelam_fl.telemetry.events import RunFailure, read_events
from server.app import main, propose
from tests.unit.conftest import MakeFederation


def test_an_unknown_command_is_refused_with_those_that_there_are() -> None:
    context: Any = SimpleNamespace(run_id=1, run_config={"command": "trian", "run-toml": "", "set": "", "out": ""})
    grid: Any = None
    with pytest.raises(ConfigError, match="command = 'trian' in the run config must be one of run, plan, chat"):
        main(grid, context)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[lora]\nrank = 0", "lora.rank = 0 must be greater than or equal to 1"),
        ('[model]\nname = "no-such-model"', "model 'no-such-model' is not built in"),
        ('[strategy]\naggregation = "fedbest"', "strategy.aggregation = 'fedbest'"),
    ],
)
def test_settings_that_the_server_refuses_are_the_last_event_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr("server.app.keep_private", lambda: None)
    monkeypatch.setattr("server.app.bounds_of", lambda environment: Bounds(runs=tmp_path))
    context: Any = SimpleNamespace(run_id=1, run_config={"command": "run", "run-toml": text, "set": "", "out": "a"})
    grid: Any = None
    with pytest.raises(UsageError):
        main(grid, context)
    (refusal,) = read_events(tmp_path / "a" / "events.jsonl")
    assert isinstance(refusal, RunFailure)
    assert refusal.reason.startswith(reason)
    assert refusal.exit_code == 2


def test_a_plan_alone_is_told_and_nothing_is_trained(federation: MakeFederation) -> None:
    run = federation("ab", "ef", "split.hosts=2", "split.front=1", "split.back=1")
    propose(run.roster, run.spec, run.folder)
    (told,) = run.events("placement")
    assert [(h["node"], h["first"], h["last"]) for h in told["sites"][0]["hosts"]] == [("e", 1, 3), ("f", 3, 5)]
    assert told["reason"] == "split.cuts = equal"
    assert not run.events("plan")
    assert run.events("run_done")
