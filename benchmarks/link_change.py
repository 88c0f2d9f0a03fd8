"""Measures how the planner reacts to a link that becomes slow in the middle of a run.

Needs a Docker engine. The testbed has two edge servers and a device, made as in `benchmarks.planner_testbeds`, all on links
of 100 Mbit/s. After the first round `tc` limits the quicker edge server to 0.3 Mbit/s each way. The second round still uses
the old plan; because its steps take longer than planned, the nodes measure their links again and the planner moves layers.
This measures time: run it on a machine that does nothing else. --smoke: two rounds of one step, no bars.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.big_llama import write_llama
from benchmarks.common import Figure, main
from benchmarks.planner import FASTER, TIME_OFF, by_round, measured_step_s, near
from benchmarks.planner_testbeds import MODEL, Bed, Machine, bed_started, once, table, train_bed
from edgelam_fl.telemetry.events import LinkMeasured, PlacementMade, RoundDone, of_kind, read_events
from testbed.__main__ import IMAGE
from testbed.compose import RUNS
from testbed.engine import build, check_engine

BED = Bed(
    "link-change", [Machine(0.5, 100), Machine(0.4, 100)], [Machine(0.5, 100)], micro_batches=4, tokens=64, rounds=4
)
SLOW, SLOW_KBIT = "edge-1", 300
# The bucket of docker/entry.sh at another rate. A kernel without ifb has no second device and limits sending only.
_CHANGE = "tc qdisc change dev {device} root tbf rate {kbit}kbit burst 6000 latency 400ms"


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    bed = replace(BED, rounds=2, steps=1) if smoke else BED
    folder = Path("runs").absolute() / ("benchmark-link-change" + ("-smoke" if smoke else ""))
    check_engine()
    build(IMAGE)
    model = write_llama(folder.parent / "benchmark-llama-wide", MODEL)
    shutil.rmtree(folder, ignore_errors=True)
    with bed_started(bed, folder, model) as containers:

        def slow(round_done: bool) -> None:
            if round_done:
                changes = [_CHANGE.format(device=device, kbit=SLOW_KBIT) for device in ("eth0", "ifb0")]
                answer = containers.ask(SLOW, f"{changes[0]} && {{ {changes[1]}; echo yes; }}", user="root")
                print(f"{SLOW}'s link: {SLOW_KBIT / 1e3:g} Mbit/s from now on" if answer else "tc failed", flush=True)

        with once(containers, f"grep -q round_done {RUNS}/{bed.name}/events.jsonl", slow):
            train_bed(bed, containers, folder / bed.name)
    figures = of_run(folder / bed.name)
    if smoke:
        figures = [replace(figure, bar=None, holds=None) for figure in figures]
    Console().print(table(figures))
    return {"bed": str(bed), "run": bed.run_file, "slow": SLOW, "slow_kbit": SLOW_KBIT, "model": MODEL}, figures


def of_run(folder: Path) -> list[Figure]:
    """Compares three rounds: the first with the quick link, the second with the slow link and the old plan, and the last."""
    plans, rounds = by_round(folder, PlacementMade), by_round(folder, RoundDone)
    trained = [number for number, done in sorted(rounds.items()) if done.steps]
    steps = {number: measured_step_s(rounds[number]) for number in trained}
    first, second, *_, last = [*trained, trained[-1]]
    links = list(of_kind(read_events(folder / "events.jsonl"), LinkMeasured))
    quicker, attempts = steps[second] / steps[last], max(rounds[number].attempt for number in trained)
    return [
        Figure("a step before", round(steps[first], 3), "s"),
        Figure("a step with the slow link and the old plan", round(steps[second], 3), "s"),
        *(Figure(f"{SLOW}'s link, found anew, {way}", round(bps / 1e6, 3), "Mbit/s")
          for link in links if link.node == SLOW
          for way, bps in (("up", link.link_up_bps), ("down", link.link_down_bps))),
        Figure("layers of the slow node in the last plan", _layers(plans[last], SLOW), "", "fewer", _layers(plans[last], SLOW) < _layers(plans[first], SLOW)),
        Figure("a step with the last plan", round(steps[last], 3), "s"),
        near("a step with the last plan, predicted over measured", plans[last].step_s / steps[last], TIME_OFF),
        Figure("a step with the old plan over one with the last", round(quicker, 3), "x", f"at least {FASTER} x", quicker >= FASTER),
        Figure("attempts that a round took, at most", attempts, "", "1", attempts == 1),
    ]  # fmt: skip


def _layers(placement: PlacementMade, node: str) -> int:
    return sum(host.last - host.first for site in placement.sites for host in site.hosts if host.node == node)


if __name__ == "__main__":
    main("link_change", measure)
