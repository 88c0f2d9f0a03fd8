"""Measures what each private mode adds to a step on this machine's CPU, alone, for SmolLM2 over stage hosts in one process.

Rounds with and without it take turns, in pairs, on two fleets of the same devices and hosts; the figures are medians over the
pairs, of the whole round's CPU seconds and of its time. `central`: a host's shared layers, where the host clips and adds noise in
each step. `device` and `channel`: whole models on the devices, each of which clips its update once a round, and with `device` adds
noise to it. The others are defences at the cut, and the low-rank payload, whose plain rounds train hosts and back with whole
gradients. Where the server clips or adds noise, nodes do nothing more than always: its part is measured by itself, per update.
--smoke: one pair of rounds of one step, which load the slices too, of a tiny random model.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import Figure, main
from edgelam_fl.config import WirelessSection
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.making import RoundPrivacy
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.channel import Exposure
from edgelam_fl.privacy.mechanism import secret_generator
from server.emulated_channel import EmulatedChannel
from server.global_adapter import first_adapter
from server.private_sums import PrivateSums
from strategies.api import Contribution
from tests.fleet import Fleet, check_done, memory_fleet
from tests.support import run_config, write_data_files, write_tiny_llama

DEVICES = 2
BAR_PERCENT = 5.0
ADDED = ": added to a step's CPU seconds"


@dataclass(frozen=True)
class Mode:
    """A private mode, as a run file and the server's plans ask for it. `common`: keys of the plain rounds too.

    `keeps`: whether nodes have a folder, for fronts that stay there; the plain rounds' then have one, and all write snapshots.
    """

    name: str
    privacy: RoundPrivacy | None = None
    keys: tuple[str, ...] = ()
    plain_keys: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    keeps: bool = False


CENTRAL = RoundPrivacy(clip=1.0, noise=1.0, devices=DEVICES)
DEVICE = RoundPrivacy(clip=1.0, noise=1.0, devices=DEVICES, device_clips=True, device_noise=True)
CHANNEL = RoundPrivacy(clip=1.0, noise=0.0, devices=DEVICES, device_clips=True)
LIMIT = "privacy.cut_clip=2.0"
WHOLE = ("split.hosts=0",)
MODES = (
    Mode("central, joint", CENTRAL, common=("split.host_mode=joint",)),
    Mode("central, sequential", CENTRAL, common=("split.host_mode=sequential",)),
    Mode("device", DEVICE, common=WHOLE),
    Mode("channel", CHANNEL, common=WHOLE),
    Mode("cut_clip", keys=(LIMIT,)),
    Mode("cut_noise", keys=(LIMIT, "privacy.cut_noise=0.25")),
    Mode("disguise", keys=("privacy.disguise=0.3",)),
    Mode("private_front", keys=("privacy.private_front=true",), keeps=True),
    Mode("low-rank", keys=("wire.gradients=lowrank", "lora.train=back"), plain_keys=("lora.train=['hosts','back']",)),
)


@dataclass(frozen=True)
class Cost:
    """The cost of one round."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Side:
    """A fleet with what its rounds start from."""

    fleet: Fleet
    start: Adapter

    def round(self, steps: int) -> Cost:
        began, cpu = time.monotonic(), time.process_time()
        check_done(self.fleet.run(self.start, steps))
        return Cost(time.process_time() - cpu, time.monotonic() - began)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    pairs, steps, warm = (1, 1, False) if smoke else (5, 2, True)
    torch.set_num_threads(1)  # stage hosts on threads of one process
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data_files(folder, 12 if smoke else 24)[:DEVICES]
        model = find_model(str(write_tiny_llama(folder / "tiny")) if smoke else "smollm2-135m")
        for mode in MODES:
            figures += _figures(mode, _pairs(model, files, mode, folder / mode.name, pairs, steps, warm), steps)
            print(*figures[-2:], sep="\n", flush=True)
        figures += _of_server(model, smoke)
    dear = [figure for figure in figures if figure.name.endswith(ADDED) and figure.value > BAR_PERCENT]
    bar = (None, None) if smoke else ("0", not dear)
    figures.append(Figure(f"modes that add more than {BAR_PERCENT:g} % to a step's CPU seconds", len(dear), "", *bar))
    return {"model": model.name, "devices": DEVICES, "pairs": pairs, "steps_per_round": steps, "threads": 1}, figures


def _pairs(
    model: ModelSource, files: list[Path], mode: Mode, folder: Path, pairs: int, steps: int, warm: bool
) -> list[tuple[Cost, Cost]]:
    """Returns the cost of rounds without and with a mode, which take turns; which of them is first takes turns, too.

    `warm`: whether a round before them loads the slices.
    """
    configs = [
        run_config(model.name, "federation.evaluate_every=1000", *mode.common, *keys)
        for keys in (mode.plain_keys, mode.keys)
    ]
    plain_config, private_config = configs
    with (
        memory_fleet(model, plain_config, files, state=folder / "plain" if mode.keeps else None) as plain,
        memory_fleet(model, private_config, files, state=folder / "private" if mode.keeps else None) as private,
    ):
        private.privacy = mode.privacy
        sides = [
            Side(fleet, first_adapter(RunSpec(config, model)))
            for fleet, config in zip((plain, private), configs, strict=True)
        ]
        for side in sides if warm else ():
            side.round(1)
        found = []
        for number in range(pairs):
            order = (0, 1) if number % 2 else (1, 0)
            costs = {which: sides[which].round(steps) for which in order}
            found.append((costs[0], costs[1]))
    return found


def _figures(mode: Mode, pairs: list[tuple[Cost, Cost]], steps: int) -> list[Figure]:
    name, cpu_percent = mode.name, 100 * (median(private.cpu_s / plain.cpu_s for plain, private in pairs) - 1)
    wall_percent = 100 * (median(private.wall_s / plain.wall_s for plain, private in pairs) - 1)
    return [
        Figure(f"{name}: a step without privacy", round(median(p.cpu_s for p, _ in pairs) / steps, 3), "CPU s"),
        Figure(f"{name}: a step", round(median(p.cpu_s for _, p in pairs) / steps, 3), "CPU s"),
        Figure(name + ADDED, round(cpu_percent, 2), "%"),
        Figure(f"{name}: added to a step's time", round(wall_percent, 2), "%"),
    ]


def _of_server(model: ModelSource, smoke: bool) -> list[Figure]:
    """Measures what the server does with an update of a whole model, per device of a round."""
    start = first_adapter(RunSpec(run_config(model.name, *WHOLE), model))
    values = sum(array.size for array in start.values())
    channel = EmulatedChannel(WirelessSection(bandwidth_hz=1e6), 1, Exposure(1e-5, "rdp"))
    on_air = channel.in_round(1, values=values, clip=1.0, noise=1.0, moves=2.0)
    figures, devices = [], DEVICES if smoke else 10
    for name, sigma, air in (("central", 1.0, None), ("channel", 0.0, on_air)):
        sums = PrivateSums(start, frozenset(), False, 1.0, sigma, float(devices), secret_generator(), air)
        cpu = time.process_time()
        for number in range(devices):
            update = {name: array + np.float32(0.1) for name, array in start.items()}
            sums.add([("", Contribution(f"device-{number}", 1.0, update))])
        sums.contributions(())
        cost_s = (time.process_time() - cpu) / devices
        figures.append(Figure(f"{name}: the server's part of an update", round(1e3 * cost_s, 1), "CPU ms"))
    return figures


if __name__ == "__main__":
    main("privacy_cost", measure)
