"""The parts `members` and `updates` of benchmarks.leakage, on a tiny model: what was learned often is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.leakage.members import BASE, Sizes, attack_seed
from edgelam_fl.model.source import ModelSource

QUICK = ("federation.local_steps=40", "federation.batch_size=8", "split.micro_batches=1", "lora.targets=['all-linear']", "optimizer.lr=5e-3")  # fmt: skip


def test_a_canary_that_is_learned_often_is_exposed_and_members_stand_out(tiny: ModelSource, tmp_path: Path) -> None:
    sizes = Sizes(1, 1, 3, 6, (1,), ((0, 3), (16, 1)), QUICK)
    texts, found = attack_seed(tiny, sizes, 1, tmp_path / "run")
    often = [canary.times for canary in texts.canaries].index(16)
    before, after = found[BASE], found["published after 1 pass"]
    assert after.exposures[often] > 9.0 > before.exposures[often], "of at most 9.97 bits"
    never = [bits for canary, bits in zip(texts.canaries, after.exposures, strict=True) if not canary.times]
    assert np.mean(never) < 5.0
    gained = before.members_N - after.members_N
    assert gained.min() > 0
    assert gained.mean() > (before.others_M - after.others_M).mean(), "members gain more than others"
    assert texts.canaries[often].pair in texts.files["device-1"]
    assert not set(texts.others) & {pair for pairs in texts.files.values() for pair in pairs}
