"""Beamforming through the engine: equal to a plain loop to the bit on one cell, and to the plain average on several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, from_bytes
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.data import batch_indices
from edgelam_fl.tasks.kinds import device_data
from edgelam_fl.wireless.beamforming.downlink import noise_at, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, pilots, received
from edgelam_fl.wireless.beamforming.values import BeamModel, beams_of, values_of
from edgelam_fl.wireless.channels.sectors import Sector
from server.checks import check_config
from server.global_adapter import first_adapter
from tests.fleet import check_done, joined, memory_fleet, same_bits
from tests.support import run_config

STEPS, SNRS_DB = 4, (0.0, 10.0)
NAMES = "base_model.model.network."


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return find_model("beamformer")


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, files = tmp_path_factory.mktemp("cells"), []
    for number in range(3):
        files.append(folder / f"cell-{number}.npz")
        np.savez(files[-1], channels=Sector(4, 3, spread_deg=10 + number).draw(12 + 6 * number, seed=number))
    return files


def beam_config(*more: str) -> RunConfig:
    return run_config(
        "beamformer", "task.kind=beamforming", "split.hosts=0", "radio.beam_snrs_db=[0.0, 10.0]", "data.held_out=0.25",
        "optimizer.lr=0.01", *more,
    )  # fmt: skip


def plain_examples(config: RunConfig, file: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """What the network sees of each example, its true channels, and its noise."""
    for one in device_data(file, task_settings(config)).training:
        true_KM = torch.from_numpy(one.arrays["channels"])
        noises, users = [noise_at(snr_db) for snr_db in SNRS_DB], len(true_KM)
        seen_SKM, error = true_KM.expand(len(SNRS_DB), -1, -1), 0.0
        for snr_db in config.radio.pilot_snrs_db:
            generator = torch.Generator().manual_seed(Random(f"{config.run.seed}/pilots/{one.digest}").getrandbits(32))
            heard_SKM = received(seen_SKM, pilots(users, users), noise_at(snr_db), generator)
            seen_SKM, error = least_squares(heard_SKM, pilots(users, users)), noise_at(snr_db) / users
        for values_KF, noise in zip(values_of(seen_SKM, torch.tensor(noises), error), noises, strict=True):
            yield values_KF, true_KM, noise


def plain_loop(config: RunConfig, file: Path, name: str) -> Adapter:
    """Trains on a cell by torch alone, with the run's seed, batches and steps."""
    torch.manual_seed(config.run.seed)
    network = BeamModel()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optimizer.lr, weight_decay=0.0)
    examples = list(plain_examples(config, file))
    for step in range(STEPS):
        drawn = batch_indices(len(examples), config.step_examples, step, config.run.seed, name)
        for half in (drawn[:2], drawn[2:]):
            seen, true, noises = zip(*(examples[number] for number in half), strict=True)
            values, channels, noise_B = torch.stack(seen), torch.stack(true), torch.tensor(noises)
            alone = torch.log2(1 + channels.abs().square().sum(2) / noise_B[:, None]).sum(1)
            missing = alone - sum_rates(channels, beams_of(network(values)), noise_B[:, None])
            (missing.sum() / len(drawn)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {NAMES + key: tensor.detach().numpy() for key, tensor in network.named_parameters()}


@pytest.mark.parametrize("more", [[], ["radio.pilot_snrs_db=[5.0]"]], ids=["known", "pilots"])
def test_one_cell_trains_like_the_plain_loop(source: ModelSource, cells: list[Path], more: list[str]) -> None:
    config = beam_config(*more)
    start = first_adapter(check_config(config))
    with memory_fleet(source, config, cells[:1]) as fleet:
        reports = fleet.run(start, STEPS)
    check_done(reports)
    found = joined(reports)
    assert same_bits(found, plain_loop(config, cells[0], "device-1"))
    assert all(not np.array_equal(found[name], start[name]) for name in start), "all of it learned"
    sums = reports["device-1"].eval_sums
    held_out = reports["device-1"].eval_labels // len(SNRS_DB)
    assert {name: sums[name] for name in sums if name.endswith("count")} == {
        "at/0/count": held_out,
        "at/10/count": held_out,
    }
    if more:
        assert sums["at/10/sum/WMMSE, channels known"] > sums["at/10/sum/"] > sums["at/10/sum/LS, then RZF"] > 0
    else:
        assert sums["at/10/sum/"] == pytest.approx(sums["at/10/sum/RZF"], rel=1e-5), "an untrained network is RZF"
        assert sums["at/10/sum/WMMSE"] > sums["at/10/sum/RZF"] > sums["at/10/sum/MRT"] > 0


def test_three_cells_are_their_plain_average(source: ModelSource, cells: list[Path]) -> None:
    config = beam_config()
    start = first_adapter(RunSpec(config, source))
    with memory_fleet(source, config, cells) as fleet:
        reports = fleet.run(start, STEPS)
    check_done(reports)
    parts = [part for report in reports.values() for part in report.contributions]
    alone = {f"device-{number}": plain_loop(config, file, f"device-{number}") for number, file in enumerate(cells, 1)}
    for part in parts:
        assert same_bits(from_bytes(part.adapter), alone[part.source])
    assert {part.weight for part in parts} == {STEPS * config.federation.batch_size}
