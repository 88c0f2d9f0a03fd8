"""Fixtures of the unit tests of the server."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelam_fl.model.source import ModelSource

if TYPE_CHECKING:
    from tests.by_hand import FederationByHand

MakeFederation = Callable[..., "FederationByHand"]


@pytest.fixture
def flower_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process make Flower's messages, as the process of a ServerApp may."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def federation(tiny: ModelSource, tmp_path: Path, flower_identity: None) -> MakeFederation:
    """Makes a federation from the names of its devices, those of its edge servers, and overrides; each in a folder of its own."""
    from tests.by_hand import FederationByHand

    folders = chain([tmp_path], (tmp_path / f"run-{number}" for number in count(2)))
    return lambda *arguments, source=tiny, **more: FederationByHand(source, next(folders), *arguments, **more)
