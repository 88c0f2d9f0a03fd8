"""The table of defences at the cut: the order of its cells, what is kept of them, and sums over seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.leakage.defence_cells import (
    INVERTER,
    NONE,
    REPLAY,
    RIDGE,
    SEEDS,
    SETTINGS,
    Kept,
    Row,
    Setting,
    Sizes,
    disguised,
    in_order,
)
from benchmarks.leakage.defence_table import cases, figures_of
from benchmarks.leakage.defences import KEPT, terms

HIDDEN = Setting("hidden", (8,), disguised(0.3))


def row(setting: Setting, seed: int, best: float, perplexity: float, *, known: bool = True) -> Row:
    shares = {RIDGE: 0.1, INVERTER: best / 2, REPLAY: best}
    return Row(setting.name, setting.cuts[0], seed, known, perplexity, 1.0, 10, 20, shares)


def test_headlines_have_all_their_seeds_before_the_others_begin() -> None:
    order = list(in_order((HIDDEN, NONE), (1, 2)))
    assert order == [(NONE, 1), (NONE, 2), (HIDDEN, 1), (HIDDEN, 2)]
    assert len(list(in_order(SETTINGS, SEEDS))) == len(SETTINGS) * len(SEEDS)


def test_only_the_first_seed_has_an_attacker_with_the_private_adapter() -> None:
    assert [HIDDEN.attackers(seed) for seed in SEEDS] == [(True, False), (False,), (False,)]
    assert NONE.attackers(2) == (True,)


def test_a_cell_counts_under_its_own_keys_and_terms_alone(tmp_path: Path) -> None:
    file, rows = tmp_path / "cells.jsonl", [row(HIDDEN, 2, 0.5, 20.0)]
    Kept(file, {"steps": 3}).add(HIDDEN, 2, rows)
    again = Kept(file, {"steps": 3})
    assert again.rows(HIDDEN, 2) == rows
    assert again.rows(HIDDEN, 1) is None
    assert again.rows(replace(HIDDEN, keys=disguised(0.1)), 2) is None
    assert Kept(file, {"steps": 4}).rows(HIDDEN, 2) is None


def test_the_committed_cells_are_those_of_the_table() -> None:
    kept = Kept(KEPT, terms(Sizes()))
    assert all(kept.rows(setting, SEEDS[0]) for setting in SETTINGS if setting.headline)


def test_points_and_price_are_taken_seed_by_seed() -> None:
    """No defence differs between the seeds as the defence does, so that neither points nor price has a spread."""
    rows = [
        row(NONE, 1, 1.0, 20.0), row(NONE, 2, 0.9, 40.0),
        row(HIDDEN, 1, 0.8, 21.0, known=False), row(HIDDEN, 2, 0.7, 42.0, known=False), row(HIDDEN, 3, 0.0, 9.0, known=False),
    ]  # fmt: skip
    first, hidden = cases(rows)
    assert (first.name, hidden.name, len(hidden.rows)) == ("no defence, cut 2", "hidden, cut 8", 2)
    assert hidden.points_of_seeds == pytest.approx([20.0, 20.0])
    assert hidden.price_of_seeds == pytest.approx([5.0, 5.0])
    told = {figure.name: figure.value for figure in figures_of(rows)}
    assert told["hidden, cut 8: points off, spread"] == 0.0
    assert told["hidden, cut 8: best attack, spread"] == pytest.approx(7.1)
    assert told["points off the best attack at that price"] == 20.0
