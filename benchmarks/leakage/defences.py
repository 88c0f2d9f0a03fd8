"""Measures defences at the cut: what the best attacks read, beside what the defence costs in perplexity, bytes and time.

Each setting trains SmolLM2-135M (bf16, LoRA of rank 16 on all linear layers) on private docstrings, over one host and on the
code that a federation runs, all settings for the same steps; its perplexity is of held-out docstrings with the defence on. Then
attacks read private docstrings from the hidden states that leave the device. The attacker is adapted: it learns from public text
that went through the same defence and the trained front. A private front's adapter it does not have: it trains a front of its own
in the same way, on public text, and learns to read that one; what it would read with the adapter is measured beside it.
Codecs on the wire and packed weights are there for their side effect: the attacker has the same.

- Ridge map and inverter learn from public docstrings and glosses.
- Token by token: the inverter's likely tokens, together with what the trained model expects next, are tried through the front that
  the attacker has (a private one: its own, and the public one; the better of both counts), on the first texts alone.

What a setting has measured with a seed stays in benchmarks/results/leakage_defences.jsonl and is not measured again. --minutes:
no cell begins after so many minutes; the table is of those that there are. --smoke: a tiny random model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Figure
from benchmarks.leakage.defence_cells import (
    BASE,
    MODEL,
    RANK,
    SEEDS,
    SETTINGS,
    SMALL,
    SMOKE,
    TEXTS_PER_STEP,
    Kept,
    Row,
    Sizes,
    in_order,
)  # fmt: skip
from benchmarks.leakage.defence_lab import Lab
from benchmarks.leakage.defence_table import figures_of, picture, table
from edgelam_fl.model.source import find_model
from edgelam_fl.privacy.attacks.replay import Search
from tests.support import write_tiny_llama

KEPT = RESULTS / "leakage_defences.jsonl"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many minutes")


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    if smoke:
        with tempfile.TemporaryDirectory() as made:
            lab = Lab(find_model(str(write_tiny_llama(Path(made) / "model"))), SMALL, Search((8,)))
            rows = lab.rows(SMOKE, SEEDS[0])
    else:
        lab = Lab(find_model(MODEL), Sizes())
        rows = all_rows(lab, options.minutes)
        (RESULTS / "leakage_defences.md").write_text(
            table(rows, lab.sizes, len(lab.private_ids), lab.chance), encoding="utf-8"
        )
        (RESULTS / "leakage_defences.svg").write_text(picture(rows), encoding="utf-8")
    settings = {
        **terms(lab.sizes), "seeds": list(SEEDS), "cells": len({(row.name, row.seed) for row in rows}),
        "public_tokens": len(lab.public_ids), "private_tokens": len(lab.private_ids), "chance": lab.chance,
        "keys": {setting.name: list(setting.keys) for setting in SETTINGS},
    }  # fmt: skip
    return settings, figures_of(rows)


def terms(sizes: Sizes) -> dict[str, Any]:
    """Returns what all cells have in common."""
    return {"model": MODEL, "base": BASE, "rank": RANK, "texts_per_step": TEXTS_PER_STEP, **asdict(sizes)}


def all_rows(lab: Lab, minutes: float) -> list[Row]:
    """Measures the cells that are missing, as long as there is time; returns the rows of all that there are, by setting."""
    kept, until = Kept(KEPT, terms(lab.sizes)), time.monotonic() + 60 * minutes
    for setting, seed in in_order(SETTINGS, SEEDS):
        if kept.rows(setting, seed) is None and time.monotonic() < until:
            kept.add(setting, seed, lab.rows(setting, seed))
    return [row for setting in SETTINGS for seed in SEEDS for row in kept.rows(setting, seed) or ()]
