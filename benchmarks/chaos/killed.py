"""Kills every process of a federation with kill -9 at a random moment of a run, starts all again, and compares the adapter's bits.

`edgelam server`, an edge server and three `edgelam client`s with TLS, as a person starts them. First a run without any of it; then
--times (20) the same run, killed at a seeded moment between its first event and its end: server, hub, SuperLink, ServerApp, the
nodes and `edgelam run` at once. What a service manager would start, server and nodes, is started again after 3 s. The run has to go on
by itself and to end with the adapter of the undisturbed run, to the bit. That takes the same nodes with their state folders: a node
that lost its disk, or a host in another's place, begins with empty moments. --smoke: one time, two rounds.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.course import Course, adapter_of
from benchmarks.chaos.faults import RESTART_S, Fault, strike
from benchmarks.chaos.federation import Federation
from benchmarks.common import Figure, main
from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.telemetry.events import Event, NodeLost, RunResumed, RunStarted, of_kind
from tests.fleet import same_bits

STEPS = 8
LIMIT_S = 600.0  # for a run, or its rest after everything was started again
_POLL_S = 0.1
_POWER = Fault("kill", "everything", "", 0.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=20, help="how often everything is killed")
    parser.add_argument("--rounds", type=int, default=3, help="of each run")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keeps all files there; must not exist")


@dataclass(frozen=True)
class Kill:
    """What became of one run whose processes were all killed. Times in seconds."""

    after_s: float
    """Since the run's first event."""
    round: int
    """The last round that was done before."""
    processes: str
    went_on_s: float | None
    """From the kill to the event that says that the run goes on; None: it was over, or went on without one."""
    outcome: str
    """equal, differs, or why the run did not end."""
    cold: tuple[str, ...]
    """Hosts' rounds after the first that began without the optimizer's moments, as "round 3: edge-1"."""
    lost: tuple[str, ...]
    """Nodes that the run lost afterwards, with the reasons."""


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    times, rounds = (1, 2) if smoke else (options.times, options.rounds)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="edgelam-killed-") as name:
        federation = Federation(options.folder or Path(name) / "federation", ["edge-1"])
        try:
            federation.start()
            seconds, reference = undisturbed(federation, rounds)
            print(f"the undisturbed run took {seconds:.1f} s", flush=True)
            kills = []
            for number in range(1, times + 1):
                kills.append(_killed(federation, f"run-{number}", rounds, chance.uniform(0, seconds), reference))
                print(f"{number} of {times}: {kills[-1]}", flush=True)
        finally:
            left = federation.stop()
    settings = {
        "rounds": rounds, "steps_of_a_round": STEPS, "seed": options.seed, "undisturbed_s": round(seconds, 1),
        "kills": [vars(kill) for kill in kills],
    }  # fmt: skip
    return settings, figures(kills, left, not smoke)


def run_settings(model: str, rounds: int) -> list[str]:
    """Returns a run's settings: short rounds with all three devices, or none."""
    return [
        f"model.name={model}", f"federation.rounds={rounds}", f"federation.local_steps={STEPS}", "federation.batch_size=4",
        "federation.min_nodes=3", "federation.expect_nodes=3", f"federation.evaluate_every={rounds}", "task.max_tokens=96",
        "data.held_out=0.25", "optimizer.lr=0.01",
    ]  # fmt: skip


def undisturbed(federation: Federation, rounds: int, more: Sequence[str] = ()) -> tuple[float, Adapter]:
    """Returns the seconds from the first event to the last of a run without faults, and its adapter. `more`: settings beside ours."""
    course = Course(federation.start_run("undisturbed", [*run_settings(str(federation.model), rounds), *more]))
    if not await_end(course, LIMIT_S):
        raise RunFailed(f"the undisturbed run did not end: {federation.said('run')[-2000:]}")
    adapter = adapter_of(course.folder)
    if isinstance(adapter, str):
        raise RunFailed(f"the undisturbed run's adapter: {adapter}")
    return (course.events[-1].time or 0) - (course.events[0].time or 0), adapter


def _killed(federation: Federation, name: str, rounds: int, after_s: float, reference: Adapter) -> Kill:
    """Does a run, and kills everything `after_s` after its first event."""
    course = Course(federation.start_run(name, run_settings(str(federation.model), rounds)))
    federation.until(lambda: has_said(course, RunStarted), LIMIT_S, f"{name} to start")
    time.sleep(max(0.0, (course.events[0].time or 0) + after_s - time.time()))
    course.look()
    before = course.rounds[-1].round if course.rounds else 0
    at = time.time()
    struck = strike(_POWER, federation, "")
    assert struck.mend is not None
    time.sleep(RESTART_S)
    struck.mend()
    ended = await_end(course, LIMIT_S)
    if not ended:
        outcome = f"did not end: {federation.said('server')[-300:]}"
    elif course.failed:
        outcome = f"failed: {course.failed}"
    else:
        found = adapter_of(course.folder)
        outcome = found if isinstance(found, str) else "equal" if same_bits(found, reference) else "differs"
    resumed = [event.time or 0 for event in of_kind(course.events, RunResumed)]
    return Kill(
        round(after_s, 2), before, struck.what, round(resumed[0] - at, 1) if resumed else None, outcome,
        tuple(f"round {done.round}: {host.name}" for done in course.rounds[1:] for host in done.hosts if host.moments == "cold"),
        tuple(f"{event.node}: {event.reason}" for event in of_kind(course.events, NodeLost)),
    )  # fmt: skip


def has_said(course: Course, kind: type[Event]) -> bool:
    """Returns whether a run has emitted an event of this kind by now."""
    course.look()
    return any(of_kind(course.events, kind))


def await_end(course: Course, seconds: float) -> bool:
    """Returns whether the run's last event came within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        course.look()
        if course.ended:
            return True
        time.sleep(_POLL_S)
    return False


def figures(kills: Sequence[Kill], left: dict[str, list[str]], bars: bool) -> list[Figure]:
    def none(name: str, count: int) -> Figure:
        return Figure(name, count, "", *(("none", not count) if bars else (None, None)))

    unequal = sum(kill.outcome != "equal" for kill in kills)
    went_on = [kill.went_on_s for kill in kills if kill.went_on_s is not None]
    return [
        Figure("times that everything was killed", len(kills), ""),
        Figure("of these, runs that went on", len(went_on), ""),
        none("adapters that are not equal to the undisturbed run's, to the bit", unequal),
        none("of these, runs that did not end well", sum(kill.outcome not in ("equal", "differs") for kill in kills)),
        Figure("from the kill until the run goes on, median", round(statistics.median(went_on), 1) if went_on else 0, "s"),
        Figure("from the kill until the run goes on, worst", max(went_on, default=0), "s"),
        *(none(f"left behind at the end: {what}", len(things)) for what, things in left.items()),
    ]  # fmt: skip


if __name__ == "__main__":
    main("killed", measure, add_options, command="python -m benchmarks.chaos.killed")
