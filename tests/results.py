"""A finished run's folder without the run: configuration, events and an adapter that changes the model's answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgelam_fl.config import to_toml
from edgelam_fl.model.adapter import Adapter, initial_adapter, write_peft_folder
from edgelam_fl.model.carry import CARRY_A, CARRY_B
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.trained_on import trained_on
from tests.support import run_config


def trained_adapter(source: ModelSource, rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Adapter:
    """Returns an adapter whose B is not zero, as after training."""
    adapter, generator = initial_adapter(source, targets, rank, 1), np.random.default_rng(2)
    return {
        name: array if "lora_A" in name else generator.normal(0, 0.3, array.shape).astype(np.float32)
        for name, array in adapter.items()
    }


def with_carry(adapter: Adapter, rank: int, seed: int = 7) -> Adapter:
    """Adds carry factors of this rank to every module, except for layer 3."""
    generator, found = np.random.default_rng([rank, seed]), dict(adapter)
    for name, a_RI in sorted(adapter.items()):
        if name.endswith(".lora_A.weight") and ".layers.3." not in name:
            module = name.removesuffix(".lora_A.weight")
            out = len(adapter[module + ".lora_B.weight"])
            found[module + CARRY_A] = generator.normal(0, 0.3, (rank, a_RI.shape[1])).astype(np.float32)
            found[module + CARRY_B] = generator.normal(0, 0.3, (out, rank)).astype(np.float32)
    return found


def write_result(folder: Path, source: ModelSource, *overrides: str, adapter: Adapter | None = None) -> Path:
    config = run_config(source.name, *overrides)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    lora = config.lora
    write_peft_folder(
        adapter or trained_adapter(source, lora.rank, lora.targets),
        folder / "adapter",
        reference=source.reference,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=lora.targets,
        kind=RunSpec(config, source).kind,
        classes=config.task.classes,
        values=RunSpec(config, source).values,
        trained_on=trained_on(source).as_json(),
    )
    return folder
