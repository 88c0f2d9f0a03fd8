"""Measures what a link that comes and goes costs: a device's is down for 2 s in every 20, and another device changes its address.

One host and three devices in processes of their own, with TLS, round after round from the same adapter, so that every round
must end with the same bits. Down means in turn: nothing passes, and connections are broken and none is let in. A changed
address: what was open is dead and neither end knows; new connections are let in. Before and after, rounds without any of it,
for the speed to compare with. --minutes: how long the link flaps (10). --smoke: two devices, one round with an outage, no bars.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.line import Line, owns
from benchmarks.common import Figure, main
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.model.source import find_model
from edgelam_fl.trust.authority import Authority
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import Fleet, joined, same_bits
from tests.parity.daemons import running
from tests.parity.test_grpc_processes import fleet_of
from tests.support import run_config, write_data_files, write_tiny_llama

EVERY_S, DOWN_S = 20.0, 2.0
QUIET_S = 60.0  # before the flapping, and after it
STEPS = 40
BAR = 0.8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the link flaps")


@dataclass
class Phase:
    """Rounds one after the other, and what became of them."""

    rounds: int = 0
    seconds: float = 0.0
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    """A line per device and round that was not done, or not in all of its steps."""
    unequal: int = 0
    """Rounds whose adapter is not that of the first round."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    quiet_s, flap_s, steps, devices = (0.0, 0.0, 4, 2) if smoke else (QUIET_S, 60 * options.minutes, STEPS, 3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_data_files(folder)[:devices]
        model = find_model(str(write_tiny_llama(folder / "tiny")))
        with running(["edge-1"], files, folder / "daemons", Authority.open(folder / "trust")) as daemons:
            fleet, start = fleet_of(daemons, "flapping", model, run_config(model.name), devices)
            line = Line(fleet.hosts["edge-1"][1])
            fleet.hosts["edge-1"] = (daemons["edge-1"], line.address)
            pids = {node: daemons[node].child.pid for node in fleet.devices}
            reference = joined(fleet.run(start, steps))  # what is loaded for the first time takes its time here
            before = _rounds(fleet, start, steps, quiet_s, reference)
            times = (0.2, 0.1, math.inf) if smoke else (EVERY_S, DOWN_S, flap_s / 2)
            outages = Outages(line, pids["device-1"], pids["device-2"], *times)
            with outages:
                flapping = _rounds(fleet, start, steps, flap_s, reference)
            after = _rounds(fleet, start, steps, quiet_s, reference)
            line.close()
    settings = {
        "devices": devices, "steps_of_a_round": steps, "every_s": EVERY_S, "down_s": DOWN_S, "minutes": flap_s / 60,
        "lost": flapping.lost[:20],
    }  # fmt: skip
    return settings, _figures(before, flapping, after, outages, smoke)


def _rounds(fleet: Fleet, start: Adapter, steps: int, seconds: float, reference: Adapter) -> Phase:
    """Does rounds for `seconds`, at least one."""
    phase, began = Phase(), time.monotonic()
    while not phase.rounds or time.monotonic() - began < seconds:
        reports = fleet.run(start, steps)
        phase.rounds += 1
        phase.tokens += sum(report.tokens_trained for report in reports.values())
        lost = [line for report in reports.values() if (line := _what_is_lost(report))]
        phase.lost += lost
        phase.unequal += not lost and not same_bits(joined(reports), reference)
        phase.seconds = time.monotonic() - began
        print(
            f"{phase.seconds:6.1f} s  round {phase.rounds}, {phase.tokens_per_s:.0f} tokens/s {lost or ''}", flush=True
        )
    return phase


def _what_is_lost(report: pb.JobReport) -> str:
    if report.state != "done":
        return f"{report.node}: {report.error}"
    left_out = [f"step {step.step}: {step.reason}" for step in report.steps if not step.counted]
    return f"{report.node}: {left_out[0]}" if left_out else ""


class Outages:
    """Takes one process's connections through a line down again and again, and strands another's once. A context."""

    def __init__(
        self, line: Line, flapping: int, moving: int, every_s: float, down_s: float, moves_after_s: float
    ) -> None:
        """flapping, moving: process ids. moves_after_s: when the other's address changes."""
        self._line, self._flapping, self._moving = line, flapping, moving
        self._every_s, self._down_s, self._moves_after_s = every_s, down_s, moves_after_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._take_turns, name="outages", daemon=True)
        self.outages, self.moved = 0, 0

    def __enter__(self) -> Outages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _take_turns(self) -> None:
        began = time.monotonic()
        while not self._over.wait(self._every_s - self._down_s):
            end = self._take_down()
            self._over.wait(self._down_s)
            end()
            self.outages += 1
            if not self.moved and time.monotonic() - began >= self._moves_after_s:
                self.moved = self._line.strand(lambda port: owns([self._moving], port))

    def _take_down(self) -> Callable[[], None]:
        """Returns what ends the outage."""
        act = self._line.refuse if self.outages % 2 else self._line.silence
        return act(lambda port: owns([self._flapping], port))


def _figures(before: Phase, flapping: Phase, after: Phase, outages: Outages, smoke: bool) -> list[Figure]:
    quiet = (before.tokens + after.tokens) / (before.seconds + after.seconds)
    ratio = flapping.tokens_per_s / quiet

    def bars(bar: str, holds: bool) -> tuple[str | None, bool | None]:
        return (None, None) if smoke else (bar, holds)

    return [
        Figure("outages", outages.outages, ""),
        Figure("connections of the device whose address changed", outages.moved, ""),
        Figure("rounds while the link flapped", flapping.rounds, ""),
        Figure("rounds that a device lost, or a step of them", len(flapping.lost), "", *bars("none", not flapping.lost)),
        Figure("whole rounds that are not equal to the undisturbed one, to the bit", flapping.unequal + after.unequal, "",
               *bars("none", not flapping.unequal + after.unequal)),
        Figure("tokens per second undisturbed", round(quiet, 1), ""),
        Figure("tokens per second while the link flapped", round(flapping.tokens_per_s, 1), ""),
        Figure("tokens per second, flapping over undisturbed", round(ratio, 3), "", *bars(f"at least {BAR:g}", ratio >= BAR)),
    ]  # fmt: skip


if __name__ == "__main__":
    main("flapping", measure, add_options)
