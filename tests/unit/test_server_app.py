"""The ServerApp's door: which of its jobs a run config asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.errors import ConfigError
from server.app import main, propose
from tests.unit.conftest import MakeFederation


def test_an_unknown_command_is_refused_with_those_that_there_are() -> None:
    context: Any = SimpleNamespace(run_id=1, run_config={"command": "trian", "run-toml": "", "set": "", "out": ""})
    grid: Any = None
    with pytest.raises(ConfigError, match="command = 'trian' in the run config must be one of run, plan, chat"):
        main(grid, context)


def test_a_plan_alone_is_told_and_nothing_is_trained(federation: MakeFederation) -> None:
    run = federation("ab", "ef", "split.hosts=2", "split.front=1", "split.back=1")
    propose(run.roster, run.spec, run.folder)
    (told,) = run.events("placement")
    assert [(h["node"], h["first"], h["last"]) for h in told["sites"][0]["hosts"]] == [("e", 1, 3), ("f", 3, 5)]
    assert told["reason"] == "split.cuts = equal"
    assert not run.events("plan")
    assert run.events("run_done")
