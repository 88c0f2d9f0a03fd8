"""Measures what base stations gain if they learn beams together: FedAvg over cells, against each alone and all samples in one place.

Four cells of 8 antennas and 6 users differ in angles, spread of the waves, path loss and SNR. All trainings go through the engine with the
same code, steps and learning rate: a device per cell with FedAvg between rounds, one device per cell alone, and one device with the samples
of all cells and as many examples per step as the cells have together. Each is tested on new channels of all cells, the same for all, and of
a fifth cell that none has learned. Few samples per cell come first, then more. Then the cells learn together from pilots alone
(`radio.pilot_snrs_db`), against RZF on the same estimates. Differences are paired by channels; intervals over seeds, of samples, first values
and order, are Student's. --smoke: one seed and few steps, no result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common import Figure, main
from edgelam_fl.config import parse_run_file
from edgelam_fl.model.source import find_model
from edgelam_fl.model.value_ends import NETWORK
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wireless.beamforming.downlink import Downlink, downlink_at, noise_at, sum_rates
from edgelam_fl.wireless.beamforming.estimation import least_squares, mmse, pilots, received
from edgelam_fl.wireless.beamforming.precoders import rzf, wmmse
from edgelam_fl.wireless.beamforming.values import BeamModel, beams_of, values_of
from edgelam_fl.wireless.channels.links import station_seed
from edgelam_fl.wireless.channels.sectors import Sector
from server.global_adapter import first_adapter
from tests.fleet import averaged, check_done, memory_fleet


class Cell(NamedTuple):
    """A cell's sector, and its users' median path loss beside the SNR of the run file."""

    sector: Sector
    gain_db: float = 0.0

    def draw(self, count: int, seed: int) -> np.ndarray:
        return self.sector.draw(count, seed) * np.float32(10 ** (self.gain_db / 20))


USERS = 6
CELLS = {
    "wide": Cell(Sector(users=USERS)),
    "narrow": Cell(Sector(users=USERS, sector_deg=20, spread_deg=5)),
    "uneven": Cell(Sector(users=USERS, spread_deg=20, shadow_db=8)),
    "far": Cell(Sector(users=USERS, sector_deg=40), gain_db=-10),
}
UNLEARNED = {"not learned by any": Cell(Sector(users=8, sector_deg=45, spread_deg=7, shadow_db=6), gain_db=-5)}
SNRS_DB = (0.0, 5.0, 10.0, 15.0, 20.0)
SAMPLES = (8, 64)  # per cell
PILOT_SNRS_DB = (0.0, 5.0, 10.0)
SEEDS, TEST_SEED, DRAWS = (1, 2, 3), 1000, 200
ROUNDS, LOCAL_STEPS, BATCH = 4, 40, 16  # the last per cell
T_QUANTILE = {2: 4.303}  # of Student, 97.5 %, by degrees of freedom
ALONE, TOGETHER, ONE_PLACE = "alone", "together", "in one place"
RUN_FILE = """\
[model]
name = "beamformer"

[split]
hosts = 0
micro_batches = 1

[task]
kind = "beamforming"

[data]
held_out = 0

[optimizer]
lr = 2e-3
schedule = "linear"
clip = "global"
"""
Rates = Mapping[str, torch.Tensor]  # by cell: the sum rate of each test draw, the mean over SNRs
Precoder = Callable[..., torch.Tensor]  # of channels and a downlink, and the network's also of an error


def trained(
    files: Sequence[Path], batch: int, seed: int, rounds: int, local_steps: int, more: Sequence[str] = ()
) -> Precoder:
    """Trains with a device per file and FedAvg between rounds; returns what makes beams by the network. `more`: overrides of the run file."""
    size = {"rounds": rounds, "local_steps": local_steps, "batch_size": batch}
    overrides = [f"run.seed={seed}", *(f"federation.{key}={value}" for key, value in size.items()), *more]
    config = parse_run_file(RUN_FILE, source="the benchmark's run file", overrides=overrides)
    source = find_model(config.model.name)
    adapter = first_adapter(RunSpec(config, source))
    with memory_fleet(source, config, files) as fleet:
        for number in range(rounds):
            reports = fleet.run(adapter, local_steps, step_offset=number * local_steps)
            check_done(reports)
            adapter = averaged(adapter, reports)
    network = BeamModel()
    network.load_state_dict({key.partition(f"{NETWORK}.")[2]: torch.from_numpy(one) for key, one in adapter.items()})
    return partial(learned, network)


def rates_of(
    precoder: Precoder, tests: Mapping[str, torch.Tensor], seen: Mapping[str, torch.Tensor] | None = None
) -> Rates:
    """Returns the sum rates of a precoder's beams. `seen`: by cell, what it sees in the place of the channels."""
    found = {}
    for cell, estimates in (seen or tests).items():
        each = [sum_rates(tests[cell], precoder(estimates, at), at.noise) for at in map(downlink_at, SNRS_DB)]
        found[cell] = torch.stack(each).mean(0)
    return found


@torch.no_grad()
def learned(network: BeamModel, channels_BKM: torch.Tensor, downlink: Downlink, error: float = 0.0) -> torch.Tensor:
    """Makes beams by a network, as `precoders` make them. `error`: of estimated channels, the variance of their entries."""
    noise_B = torch.full((len(channels_BKM),), downlink.noise)
    return beams_of(network(values_of(channels_BKM.to(torch.complex64), noise_B, error))).to(channels_BKM.dtype)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    seeds, draws, rounds, local_steps = (SEEDS[:1], 4, 1, 1) if smoke else (SEEDS, DRAWS, ROUNDS, LOCAL_STEPS)
    tests = {
        name: torch.from_numpy(cell.draw(draws, TEST_SEED)).to(torch.complex128)
        for name, cell in (CELLS | UNLEARNED).items()
    }
    settings = {
        "cells": {name: repr(cell) for name, cell in (CELLS | UNLEARNED).items()}, "snrs_db": SNRS_DB, "samples": SAMPLES, "draws": draws,
        "seeds": seeds, "steps": rounds * local_steps, "batch": BATCH, "run_file": RUN_FILE,
    }  # fmt: skip
    best = partial(wmmse, iterations=2 if smoke else 100)
    known = {name: rates_of(precoder, tests) for name, precoder in (("RZF", rzf), ("WMMSE", best))}
    figures = [
        Figure(f"{cell}, {name}", round(float(rates.mean()), 3), "bit/s/Hz, mean over SNRs")
        for name, of_cells in known.items()
        for cell, rates in of_cells.items()
    ]
    figures += [Figure(f"learned cells, {name}", round(_of_learned(one), 3), "bit/s/Hz") for name, one in known.items()]
    for samples in SAMPLES[:1] if smoke else SAMPLES:
        began_s = time.process_time()
        each = [_trainings(samples, seed, rounds, local_steps, tests) for seed in seeds]
        figures += _figures(f"{samples} samples", each, known)
        figures.append(
            Figure(f"{samples} samples, CPU per seed", round((time.process_time() - began_s) / len(seeds), 1), "s")
        )
    return settings, [*figures, *_from_pilots(seeds, rounds, local_steps, tests)]


def _from_pilots(
    seeds: Sequence[int], rounds: int, local_steps: int, tests: Mapping[str, torch.Tensor]
) -> Iterator[Figure]:
    """Yields what cells reach that learn together from estimates, at each SNR of the pilots, and RZF on the same estimates."""
    samples, more = SAMPLES[-1], [f"radio.pilot_snrs_db={list(PILOT_SNRS_DB)}"]
    networks, sent = [], pilots(USERS, USERS, torch.complex128)
    for seed in seeds:
        with TemporaryDirectory() as folder:
            networks.append(trained(_written(Path(folder), samples, seed), BATCH, seed, rounds, local_steps, more))
    for snr_db in PILOT_SNRS_DB:
        noise, known, each = noise_at(snr_db), dict[str, Rates](), [dict[str, Rates]() for _ in seeds]
        generator = torch.Generator().manual_seed(TEST_SEED)
        heard = {cell: received(tests[cell], sent, noise, generator) for cell in CELLS}
        estimates = {cell: least_squares(one, sent) for cell, one in heard.items()}
        shorter = {cell: mmse(one, sent, noise) for cell, one in heard.items()}
        for name, seen in (("LS, then RZF", estimates), ("MMSE, then RZF", shorter)):
            known[name] = rates_of(rzf, tests, seen)
        for rates, network in zip(each, networks, strict=True):
            rates |= known | {TOGETHER: rates_of(partial(network, error=noise / USERS), tests, estimates)}
        where = f"pilots at {snr_db:g} dB, {samples} samples"
        for name in (TOGETHER, *known):
            rate = fmean(_of_learned(rates[name]) for rates in each)
            yield Figure(f"{where}, learned cells, {name}", round(rate, 3), "bit/s/Hz, mean over SNRs and seeds")
        for name in known:
            yield from _apart(f"{where}, learned cells, {TOGETHER} less {name}", each, list(CELLS), TOGETHER, name)


def _written(folder: Path, samples: int, seed: int) -> list[Path]:
    """Writes a file of samples per cell; returns the files."""
    files = []
    for name, cell in CELLS.items():
        files.append(folder / f"{name}.npz")
        np.savez(files[-1], channels=cell.draw(samples, station_seed(seed, name)))
    return files


def _trainings(
    samples: int, seed: int, rounds: int, local_steps: int, tests: Mapping[str, torch.Tensor]
) -> dict[str, Rates]:
    """Returns the rates of each way to train. Alone, each cell is tested with its own network, and the unlearned one with all."""
    with TemporaryDirectory() as folder:
        files = _written(Path(folder), samples, seed)
        whole = Path(folder) / "all.npz"
        np.savez(whole, channels=np.concatenate([np.load(file)["channels"] for file in files]))
        together = trained(files, BATCH, seed, rounds, local_steps)
        one_place = trained([whole], BATCH * len(files), seed, rounds, local_steps)
        alone = [rates_of(trained([file], BATCH, seed, rounds, local_steps), tests) for file in files]
    own = {name: rates[name] for name, rates in zip(CELLS, alone, strict=True)}
    others = {name: torch.stack([rates[name] for rates in alone]).mean(0) for name in UNLEARNED}
    return {ALONE: own | others, TOGETHER: rates_of(together, tests), ONE_PLACE: rates_of(one_place, tests)}


def _figures(where: str, each: Sequence[Mapping[str, Rates]], known: Mapping[str, Rates]) -> Iterator[Figure]:
    for way in (ALONE, TOGETHER, ONE_PLACE):
        for cell in CELLS | UNLEARNED:
            rate = fmean(float(rates[way][cell].mean()) for rates in each)
            yield Figure(f"{where}, {cell}, {way}", round(rate, 3), "bit/s/Hz, mean over SNRs and seeds")
        rate = fmean(_of_learned(rates[way]) for rates in each)
        yield Figure(f"{where}, learned cells, {way}", round(rate, 3), "bit/s/Hz, mean over SNRs and seeds")
        low, high = (_of_learned(known[name]) for name in ("RZF", "WMMSE"))
        yield Figure(
            f"{where}, learned cells, {way}, of the way to WMMSE", round(100 * (rate - low) / (high - low), 1), "%"
        )
    for more, less in ((TOGETHER, ALONE), (ONE_PLACE, TOGETHER)):
        for cells, name in ((list(CELLS), "learned cells"), (list(UNLEARNED), next(iter(UNLEARNED)))):
            yield from _apart(f"{where}, {name}, {more} less {less}", each, cells, more, less)


def _apart(
    name: str, each: Sequence[Mapping[str, Rates]], cells: Sequence[str], more: str, less: str
) -> Iterator[Figure]:
    """Yields a difference, the low end of its interval over test draws for the worst seed, and half its interval over seeds."""
    apart = [torch.stack([rates[more][cell] - rates[less][cell] for cell in cells]).mean(0) for rates in each]
    yield Figure(name, round(fmean(float(one.mean()) for one in apart), 4), "bit/s/Hz, mean of the seeds")
    lows = [float(one.mean() - 1.96 * one.std() / math.sqrt(len(one))) for one in apart]
    yield Figure(f"{name}, low end", round(min(lows), 4), "bit/s/Hz, 95 % over paired draws, least of the seeds")
    if len(apart) - 1 in T_QUANTILE:
        half = T_QUANTILE[len(apart) - 1] * stdev(float(one.mean()) for one in apart) / math.sqrt(len(apart))
        yield Figure(f"{name}, half the interval over seeds", round(half, 4), "bit/s/Hz, 95 %, Student's t")


def _of_learned(rates: Rates) -> float:
    return fmean(float(rates[cell].mean()) for cell in CELLS)


if __name__ == "__main__":
    main("beam_cells", measure)
