"""The ServerApp's door: which of its jobs a run config asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.errors import ConfigError
from server.app import main


def test_an_unknown_command_is_refused_with_those_that_there_are() -> None:
    context: Any = SimpleNamespace(run_id=1, run_config={"command": "trian", "run-toml": "", "set": "", "out": ""})
    grid: Any = None
    with pytest.raises(ConfigError, match="command = 'trian' in the run config must be one of run, plan, chat"):
        main(grid, context)
