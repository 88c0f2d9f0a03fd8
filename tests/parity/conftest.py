"""Fixtures that every test of bit-equality needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parity.daemons import Daemon, running
from tests.support import write_data_files


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Gives references one thread, as stage hosts have: the number of threads changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """So few examples per device that its second pass begins within four steps of four."""
    return write_data_files(tmp_path_factory.mktemp("few"), fewest=9)


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory, data_files: list[Path]) -> Iterator[dict[str, Daemon]]:
    """edge-1 to edge-3 and device-1 to device-3, for all tests of this folder: what they hold changes with the plan."""
    with running(["edge-1", "edge-2", "edge-3"], data_files, tmp_path_factory.mktemp("daemons")) as started:
        yield started
