"""The processes that all cells of a matrix use: which cells may begin together."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from edgelam_fl.bench.runner import Engine
from edgelam_fl.federation.operator import Operator
from tests.support import WAIT_S


def test_the_first_cell_begins_alone_and_all_others_together(tmp_path: Path) -> None:
    engine = Engine(Operator("127.0.0.1:1", tmp_path), [], queue.SimpleQueue())
    inside, together = threading.Event(), threading.Barrier(2)

    def next_cell() -> None:
        with engine.beginning() as begun:
            inside.set()
            begun()
            together.wait(WAIT_S)

    others = [threading.Thread(target=next_cell, daemon=True) for _ in range(2)]
    with engine.beginning() as begun:
        for other in others:
            other.start()
        assert not inside.wait(0.05), "the App is not unpacked yet"
        begun()
        assert inside.wait(WAIT_S), "it is, though the first cell goes on"
        for other in others:
            other.join(WAIT_S)
    assert not together.broken


def test_a_first_cell_that_fails_leaves_its_turn_to_the_next(tmp_path: Path) -> None:
    engine = Engine(Operator("127.0.0.1:1", tmp_path), [], queue.SimpleQueue())
    with pytest.raises(ValueError, match="no App"), engine.beginning():
        raise ValueError("no App")
    with engine.beginning() as begun:
        begun()
        begun()
