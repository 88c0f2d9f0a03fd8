"""What the boards' benchmark compares, on numbers made by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import boards
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import Event
from tests.recorded import as_events


def events(**losses: list[float]) -> list[Event]:
    devices = [
        {"name": name, "step_losses": found, "tokens": 20 * len(found), "train_seconds": 3.0 * len(found)}
        for name, found in losses.items()
    ]
    evaluation = {"event": "round_done", "devices": [{**device, "step_losses": []} for device in devices]}
    lines: list[dict] = [
        {"event": "plan"},
        {"event": "round_done", "devices": devices},
        evaluation,
        {"event": "run_done"},
    ]
    return as_events(lines)


def test_the_farthest_step_counts() -> None:
    reference, result = (
        events(pi4=[3.0, 2.0, 1.0], pi5=[3.0, 2.0, 1.0]),
        events(pi4=[3.0, 2.0, 1.00009], pi5=[3.0, 1.9998, 1.0]),
    )
    figures = {figure.name: figure for figure in boards.losses_apart(reference, result)}
    four, five = (figures[f"{name}: loss of a step, farthest from x86"] for name in ("pi4", "pi5"))
    assert (four.value, four.holds) == (pytest.approx(1.00009 - 1.0, rel=0.05), True)
    assert (five.value, five.holds) == (pytest.approx(2.0 - 1.9998, rel=0.05), False)
    assert (figures["pi4: tokens a step"].value, figures["pi4: a step under emulation"].value) == (20, 3)


def test_a_step_that_is_missing_is_no_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(boards.losses_apart(events(pi4=[3.0, 2.0]), events(pi4=[3.0])))


def test_the_updates_are_compared_and_not_the_adapters(tiny: ModelSource) -> None:
    """One layer of the boards' goes another way, at a right angle to what it did before; everything else as before."""
    start = adapters.initial_adapter(tiny, ("q_proj",), 8, 1)
    generator, last = np.random.default_rng(0), tiny.num_layers - 1
    moves = {name: generator.normal(0, 1e-3, array.shape).astype(np.float32) for name, array in start.items()}
    turned = {name: np.sign(move) * abs(move) for name, move in moves.items()}
    for name in (name for name in start if layer_number(name) == last):
        other = generator.normal(0, 1, moves[name].shape)
        other -= moves[name] * (other * moves[name]).sum() / (moves[name] ** 2).sum()
        turned[name] = other * np.linalg.norm(moves[name]) / np.linalg.norm(other)
    reference, result = ({name: start[name] + part[name] for name in start} for part in (moves, turned))

    def share(layers: set[int]) -> float:
        """Of the squared length of what moved, what the untouched layers among these have."""
        squares = {n: float((moves[n].astype(np.float64) ** 2).sum()) for n in start if layer_number(n) in layers}
        return sum(s for n, s in squares.items() if layer_number(n) != last) / sum(squares.values())

    figures = list(boards.cosines(start, reference, result, tiny.num_layers))
    every = set(range(tiny.num_layers))
    expected = [share({0, last}), share(every - {0, last}), share(every)]
    assert [figure.value for figure in figures] == pytest.approx(expected, abs=1e-4)
    assert [figure.holds for figure in figures] == [False, True, False]


def test_both_roots_or_with_smoke_none() -> None:
    def options(**given: Any) -> argparse.Namespace:
        return argparse.Namespace(**{"smoke": False, "root_a72": None, "root_a76": None, "enter": "chroot", **given})

    assert boards.boards(options(smoke=True)) == []
    for wrong in ({}, {"root_a72": Path("a")}, {"root_a76": Path("b"), "smoke": True}):
        with pytest.raises(SystemExit, match="are both needed"):
            boards.boards(options(**wrong))
    pi4, pi5 = boards.boards(options(root_a72=Path("a"), root_a76=Path("b"), enter="sudo chroot"))
    assert (pi4.name, pi4.environment["QEMU_CPU"], pi5.environment["QEMU_CPU"]) == ("pi4", "cortex-a72", "cortex-a76")
    assert pi5.command("x", "-y") == ["sudo", "chroot", "b", "x", "-y"]
