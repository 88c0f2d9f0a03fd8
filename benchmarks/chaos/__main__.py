"""Injects seeded faults into real processes and judges what becomes of the runs.

`python -m benchmarks.chaos --seed N --faults 100`: a federation of `edgelam server`, edge servers and three `edgelam client`s,
all with TLS, and one `edgelam run` after the other; every fault at a random moment of a round. --edges 1, 2 or both (half of
the faults each); --relay: edge servers are reached through the hub alone; --only: kinds of faults, as hub or kill:hub. Writes
benchmarks/results/chaos.json and the table chaos.md. Every fault's record is printed as it comes. Full disks need a user who may mount; for
others they are left out. --with FILES: earlier results are counted in. --smoke: three faults, one edge server, no reference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.cost import revision
from benchmarks.chaos.faults import schedule
from benchmarks.chaos.federation import Federation
from benchmarks.chaos.table import UNDISTURBED, figures, of_newest, table
from benchmarks.chaos.trial import RunEnd, Trial, Verdict
from benchmarks.common import RESULTS, Figure, main

DEVICES = ("device-1", "device-2", "device-3")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults, their victims and moments")
    parser.add_argument("--faults", type=int, default=100, help="how many")
    parser.add_argument("--edges", choices=("1", "2", "both"), default="both", help="edge servers of the federation")
    parser.add_argument("--relay", action="store_true", help="edge servers are reached through the hub alone")
    parser.add_argument("--rounds", type=int, default=40, help="of each run")
    parser.add_argument("--limit", type=float, default=150.0, help="longest recovery that is waited for, in seconds")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no fault begins")
    parser.add_argument("--only", nargs="*", default=[], metavar="[ACTION:]TARGET", help="faults of these kinds alone")
    parser.add_argument("--no-reference", action="store_true", help="without the undisturbed run before")
    parser.add_argument("--with", dest="earlier", nargs="*", type=Path, default=[], metavar="FILE",
                        help="earlier results of this benchmark, whose faults are counted too; --faults 0: these alone")  # fmt: skip
    parser.add_argument("--folder", type=Path, help="keeps all files there; must not exist")


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so would all it starts
    began = time.monotonic()
    count, rounds = (3, 8) if smoke else (options.faults, options.rounds)
    sizes = [1] if smoke else [1, 2] if options.edges == "both" else [int(options.edges)]
    faults = schedule(options.seed, count, DEVICES, options.only)
    shares = [faults[n :: len(sizes)] for n in range(len(sizes))]
    root = options.folder or Path(tempfile.mkdtemp(prefix="edgelam-chaos-"))
    verdicts: list[Verdict] = []
    ends: list[RunEnd] = []
    rounds_s: list[float] = []
    left: dict[str, list[str]] = {}
    for number, (edges, share) in enumerate(zip(sizes, shares, strict=True), 1):
        if not share:
            continue
        federation = Federation(root / f"{edges}-edges", [f"edge-{n + 1}" for n in range(edges)], options.relay)
        try:
            _say(began, f"{edges} edge servers, {len(share)} faults; up after {federation.start():.1f} s")
            trial = Trial(federation, rounds, options.limit)
            if not (smoke or options.no_reference):
                rounds_s += trial.undisturbed()
                _say(began, f"undisturbed rounds: {[round(seconds, 1) for seconds in rounds_s[-rounds:]]}")
            for verdict in trial.verdicts(share):
                verdicts.append(verdict)
                _say(began, f"{len(verdicts)}/{count} {json.dumps(verdict.to_json())}")
                if time.monotonic() - began > 60 * options.minutes * number / len(sizes):
                    _say(began, "out of time")
                    break
            ends += trial.ends
        finally:
            for what, things in federation.stop().items():
                left.setdefault(what, []).extend(things)
        _say(began, f"runs: {[vars(end) for end in trial.ends]}; left: {left}")
    if options.folder is None:
        shutil.rmtree(root, ignore_errors=True)
    batch = {
        "seed": options.seed, "revision": revision(Path(__file__).parents[2]), "edge_servers": sizes, "relay": options.relay,
        "rounds_of_a_run": rounds, "limit_s": options.limit, "minutes": round((time.monotonic() - began) / 60, 1),
        "load": round(os.getloadavg()[1], 1), "undisturbed_s": rounds_s, "faults": [verdict.to_json() for verdict in verdicts],
        "runs": [vars(end) for end in ends], "left": left,
    }  # fmt: skip
    batches = [one for file in options.earlier for one in _batches(file)] + [batch] * bool(verdicts)
    verdicts = [Verdict.from_json(fault) for one in batches for fault in one["faults"]]
    if not smoke:
        (RESULTS / "chaos.md").write_text(table(verdicts), encoding="utf-8")
    print(table(verdicts), flush=True)
    found = figures(
        verdicts,
        [RunEnd(**end) for one in batches for end in one["runs"]],
        {
            what: [thing for one in batches for thing in one["left"].get(what, [])]
            for what in left or batches[0]["left"]
        },
        [seconds for one in batches for seconds in one["undisturbed_s"]],
    )
    newest = [Verdict.from_json(fault) for fault in batches[-1]["faults"]]
    settings = {"minutes": round(sum(one["minutes"] for one in batches), 1), "batches": batches}
    return settings, [*found, *of_newest(newest)]


def _batches(file: Path) -> list[dict[str, Any]]:
    """Returns what was done at once in a result, in parts if it counts others in. An old form has the median of undisturbed rounds alone."""
    result = json.loads(file.read_text(encoding="utf-8"))
    median = [figure["value"] for figure in result["figures"] if figure["name"] == UNDISTURBED]
    found: list[dict[str, Any]] = result["settings"].get("batches", [{"undisturbed_s": median, **result["settings"]}])
    return found


def _say(began: float, text: str) -> None:
    print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)


if __name__ == "__main__":
    main("chaos", measure, add_options)
