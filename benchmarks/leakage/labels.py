"""Measures how many labels a host reads from the gradients that a device sends back, by layers that stay at the device's back.

Attacks what a host recorded in a real split run of one step per setting. The attacker has the public back. Beside the share: what
the model's own first prediction and the commonest label get right without a gradient. The upper line is 100 %: a gradient at
the logits is below zero at the label alone.

--smoke: a tiny random model, back = 0, two texts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Figure
from benchmarks.leakage.frames import record
from benchmarks.leakage.looking import back_of
from benchmarks.leakage.texts import MODULES, private_texts
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.privacy.attacks import labels
from edgelam_fl.privacy.attacks.labels import NONE
from edgelam_fl.privacy.attacks.seen import interval, share
from edgelam_fl.tasks.base import Unit
from edgelam_fl.tasks.causal_lm import IGNORED
from tests.support import run_config, write_tiny_llama

MODEL, BASE = "smollm2-135m", "fp32"
BACKS = (0, 1, 2, 4)  # layers that the device has after the host
TEXTS, MOST_TOKENS = 8, 32
FRONT = 2  # layers at the device's front; they change nothing here
UNIT, SOLVED = "% of labels", "solved from the gradient"


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return measure_model(find_model(str(write_tiny_llama(Path(folder))) if smoke else MODEL), smoke)


def measure_model(source: ModelSource, smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    backs = BACKS[:1] if smoke else BACKS
    texts = private_texts()[::8][: 2 if smoke else TEXTS]
    figures: list[Figure] = []
    table = []
    for back in backs:
        read_N, guessed_N, labels_N, lengths_R = measure_back(source, texts, back)
        hits_N = (read_N == labels_N).float()
        low, high = interval(hits_N, lengths_R)
        check = ("at least 95 %", share(hits_N) >= 0.95) if back == 0 else (None, None)
        figures.append(Figure(f"back {back}: {SOLVED}", percent(share(hits_N)), UNIT, *check))
        table.append(
            {
                "model": MODEL,
                "base": BASE,
                "back": back,
                "attack": SOLVED,
                "share": share(hits_N),
                "interval": [low, high],
            }
        )
    common = {
        "without gradient: the model's own first prediction": share(guessed_N == labels_N),
        "without gradient: always the commonest label": share(labels_N == labels_N.mode().values),
    }
    figures += [Figure(name, percent(value), UNIT) for name, value in common.items()]
    settings = {
        "model": MODEL, "base": BASE, "backs": list(backs), "front": FRONT, "texts": len(texts), "steps": 1,
        "max_tokens": MOST_TOKENS, "labels": len(labels_N), "private_modules": list(MODULES), "table": table,
    }  # fmt: skip
    return settings, figures


def measure_back(
    source: ModelSource, texts: list[str], layers: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Returns, for all labels of one recorded step: what is read, what the model predicts, the labels, and labels per text."""
    config = run_config(
        source.name, f"model.base={BASE}", f"split.front={FRONT}", f"split.back={layers}", f"task.max_tokens={MOST_TOKENS}",
        "task.template=plain", f"federation.batch_size={len(texts)}", "data.held_out=0.01",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (recorded,) = record(source, config, texts, Path(folder), rounds=[1])
    back = back_of(source, BASE, layers)
    reads, guesses, targets = [], [], []
    for frame, unit in zip(recorded.frames, recorded.units, strict=True):
        for row, length in enumerate(frame.lengths_B):
            states_TD, gradient_TD = frame.output_BTD[row, :length], frame.gradient_BTD[row, :length]
            read_T = labels.read(states_TD, gradient_TD, back)
            with torch.no_grad():
                guessed_T = (back.features(states_TD[None])[0] @ back.head_VD.T).argmax(1)
            target_T = targets_of(unit, row, length)
            has = target_T != NONE
            reads.append(read_T[has])
            guesses.append(guessed_T[has])
            targets.append(target_T[has])
    return torch.cat(reads), torch.cat(guesses), torch.cat(targets), tuple(map(len, targets))


def targets_of(unit: Unit, row: int, length: int) -> torch.Tensor:
    """Returns the label [T] that each position predicts, NONE if there is none."""
    labels_T = unit.labels[row, 1:length].clone()
    labels_T[labels_T == IGNORED] = NONE
    return torch.cat([labels_T, torch.tensor([NONE])])


def percent(value: float) -> float:
    return round(100 * value, 1)
