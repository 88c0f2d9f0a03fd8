"""Kills a server with kill -9 in each phase of a round, starts it again, and watches whether the run goes on by itself.

`edgelam server`, an edge server and three `edgelam client`s with TLS; `edgelam run` follows. The whole server goes at once: its command,
the hub, the SuperLink and the ServerApp; the nodes live. Phases: waiting for nodes, sending plans, training, collecting answers,
aggregating (by a rule that takes its time), writing the checkpoint, evaluating at the end. After 3 s the server is started
again. Bars: by 30 s after that all nodes have a plan again, each run ends well with the adapter of an undisturbed run, to the bit, and the
command that follows it ends well too. --times: of each phase (1). --smoke: one phase.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.course import Course, adapter_of
from benchmarks.chaos.faults import RESTART_S
from benchmarks.chaos.federation import Federation
from benchmarks.chaos.killed import LIMIT_S, await_end, run_settings, undisturbed
from benchmarks.common import Figure, main
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.telemetry.events import (
    Event,
    EventTail,
    JobDone,
    JobStarted,
    NodeJoined,
    PlanMade,
    RunResumed,
    StepDone,
    of_kind,
)
from tests.fleet import same_bits

ROUNDS, ROUND = 3, 2  # of each run; the one that is struck
BACK_BAR_S = 30.0
_TICK_S = 0.002
_FOLLOWER_S = 30.0
_SERVER = ("server", "hub", "superlink", "serverapp")
_RULE, _MARK = "slow_rule", "aggregating"
_RULE_CODE = f'''"""FedAvg that takes its time, and says when it begins."""
import time
from pathlib import Path
from strategies.aggregation.fedavg import FedAvg

class SlowFedAvg(FedAvg):
    def aggregate(self, contributions, start):
        Path(__file__).with_name("{_MARK}").touch()
        time.sleep(1.0)
        return super().aggregate(contributions, start)
'''


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=1, help="how often in each phase")
    parser.add_argument("--folder", type=Path, help="keeps all files there; must not exist")


@dataclass(frozen=True)
class Killed:
    """What became of one run whose server was killed. Times in seconds since the server was started again."""

    phase: str
    evidence: str
    """What the benchmark saw of the phase."""
    resumed_s: float | None
    """Until the run went on."""
    back_s: float | None
    """Until all nodes had a plan again."""
    outcome: str
    """equal, differs, or why the run did not end well."""
    follower: int | None
    """Exit status of `edgelam run`; None: it did not end."""


class Look:
    """What a run and its first device have said so far."""

    def __init__(self, federation: Federation, folder: Path) -> None:
        self.federation, self.folder, self.course = federation, folder, Course(folder)
        self._tail = EventTail(federation.node_state("device-1") / "events.jsonl")
        self._tail.poll()  # of earlier runs
        self._of_device: list[Event] = []

    def plans(self) -> list[PlanMade]:
        self.course.look()
        return list(of_kind(self.course.events, PlanMade))

    def of_device(self) -> list[Event]:
        self._of_device += self._tail.poll()
        return self._of_device


def _waiting(look: Look) -> str:
    look.course.look()
    here = {event.node for event in of_kind(look.course.events, NodeJoined)}
    return f"{len(here)} of 4 nodes are here" if len(here) == len(look.federation.nodes) - 1 else ""


def _sending(look: Look) -> str:
    return f"the plan of round {ROUND} is made" if any(plan.round == ROUND for plan in look.plans()) else ""


def _training(look: Look) -> str:
    steps = [step for step in of_kind(look.of_device(), StepDone) if f"/{ROUND}/" in step.job]
    return f"step {steps[-1].step} of round {ROUND} is done" if steps else ""


def _collecting(look: Look) -> str:
    over = [done for done in of_kind(look.of_device(), JobDone) if f"/{ROUND}/" in done.job]
    return f"device-1 has done round {ROUND}" if over else ""


def _aggregating(look: Look) -> str:
    mark = look.federation.folder / _MARK
    if len(look.plans()) < ROUND:
        mark.unlink(missing_ok=True)
        return ""
    return "the rule has begun" if mark.exists() else ""


def _writing(look: Look) -> str:
    """Returns the checkpoint's folder, which may be in place already: a small one is written within a tick."""
    with suppress(FileNotFoundError):
        return next((name for name in os.listdir(look.folder / "checkpoints") if name.startswith(f"r{ROUND:06d}")), "")
    return ""


def _evaluating(look: Look) -> str:
    begun = [event for event in of_kind(look.of_device(), JobStarted) if f"/{ROUNDS + 1}/" in event.job]
    return "device-1 has begun the evaluation" if begun else ""


PHASES: dict[str, Callable[[Look], str]] = {
    "waiting for nodes": _waiting,
    "sending plans": _sending,
    "training": _training,
    "collecting answers": _collecting,
    "aggregating": _aggregating,
    "writing the checkpoint": _writing,
    "evaluating": _evaluating,
}


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    phases = list(PHASES)[2:3] if smoke else list(PHASES) * options.times
    with tempfile.TemporaryDirectory(prefix="edgelam-server-killed-") as name:
        federation = Federation(options.folder or Path(name) / "federation", ["edge-1"], rules=[_RULE])
        federation.folder.mkdir()
        (federation.folder / f"{_RULE}.py").write_text(_RULE_CODE, encoding="utf-8")
        settings = [f"strategy.aggregation={_RULE}:SlowFedAvg"]
        try:
            federation.start()
            _, reference = undisturbed(federation, ROUNDS, settings)
            found = []
            for number, phase in enumerate(phases, 1):
                found.append(_killed(federation, f"run-{number}", phase, settings, reference))
                print(f"{number} of {len(phases)}: {found[-1]}", flush=True)
        finally:
            left = federation.stop()
    return {"rounds": ROUNDS, "struck_round": ROUND, "kills": [vars(one) for one in found]}, figures(
        found, left, not smoke
    )


def _killed(federation: Federation, name: str, phase: str, settings: list[str], reference: Adapter) -> Killed:
    """Does a run, and kills the server in one phase of it."""
    awaits_a_node = phase == "waiting for nodes"
    if awaits_a_node:
        _end_node(federation, "device-3")
    look = Look(federation, federation.runs / name)
    federation.start_run(name, [*run_settings(str(federation.model), ROUNDS), *settings])
    evidence = _await(partial(PHASES[phase], look))
    for process in [process for kind in _SERVER for process in federation.find(kind)]:
        process.signal(signal.SIGKILL)
    if phase == "writing the checkpoint" and not _writing(look).endswith(".part"):
        evidence = f"{evidence}, and it was in place when the server died"
    time.sleep(RESTART_S)
    plans, again = len(look.plans()), time.time()
    federation.start_server()
    if awaits_a_node:
        federation.start_node("device-3")
    ended = await_end(look.course, LIMIT_S)
    resumed = [event.time or 0 for event in of_kind(look.course.events, RunResumed)]
    everybody = [plan.time or 0 for plan in look.plans()[plans:] if set(federation.nodes) <= set(plan.nodes)]
    found = adapter_of(look.folder) if ended and not look.course.failed else look.course.failed or "did not end"
    follower = None
    with suppress(subprocess.TimeoutExpired):
        follower = federation.commands["run"].wait(_FOLLOWER_S)
    return Killed(
        phase, evidence, round(resumed[0] - again, 1) if resumed else None,
        round(everybody[0] - again, 1) if everybody else None,
        found if isinstance(found, str) else "equal" if same_bits(found, reference) else "differs", follower,
    )  # fmt: skip


def _end_node(federation: Federation, name: str) -> None:
    federation.commands[name].send_signal(signal.SIGINT)
    federation.commands[name].wait(LIMIT_S)


def _await(reached: Callable[[], str]) -> str:
    """Waits for a phase, and returns what was seen of it. Raises TimeoutError if it does not come."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if evidence := reached():
            return evidence
        time.sleep(_TICK_S)
    raise TimeoutError("the phase did not come")


def figures(found: Sequence[Killed], left: dict[str, list[str]], bars: bool) -> list[Figure]:
    def bar(name: str, value: float, unit: str, words: str, holds: bool) -> Figure:
        return Figure(name, value, unit, words if bars else None, holds if bars else None)

    back = [one.back_s for one in found if one.back_s is not None]
    unequal = sum(one.outcome != "equal" for one in found)
    unwell = sum(one.follower != 0 for one in found)
    return [
        Figure("times that the server was killed", len(found), ""),
        Figure("phases of a round", len({one.phase for one in found}), ""),
        bar("runs that did not end well with the undisturbed run's adapter, to the bit", unequal, "", "none", not unequal),
        bar("commands that followed a run and did not end well", unwell, "", "none", not unwell),
        bar("from the server's start until all nodes have a plan, worst", max(back, default=0.0), "s",
            f"at most {BACK_BAR_S:g} s", len(back) == len(found) and max(back, default=0.0) <= BACK_BAR_S),
        *(bar(f"left behind at the end: {what}", len(things), "", "none", not things) for what, things in left.items()),
    ]  # fmt: skip


if __name__ == "__main__":
    main("server_killed", measure, add_options, command="python -m benchmarks.chaos.server_killed")
