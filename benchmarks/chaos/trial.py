"""One federation, its runs and the faults that befall them: strikes, watches the recovery, mends as a service manager would, judges.

Knows how to tell a recovery from a loss; knows no table.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.chaos.course import Course, adapter_of, devices_missing
from benchmarks.chaos.faults import RESTART_S, Fault, Struck, strike
from benchmarks.chaos.federation import Federation
from benchmarks.chaos.processes import processes
from edgelam_fl.errors import RunFailed

_POLL_S = 0.2
_FIRST_ROUND_S = 240.0  # a run's start included
_STOP_S = 60.0
_END_S = 10.0  # within which processes end whose command was killed
_FEW_ROUNDS = 3  # too few for another fault and its recovery
_GO_ON = re.compile(r"edgelam run [^\n`]*--resume[^\n`]*")


def settings(model: str, rounds: int) -> list[str]:
    """Returns a run's settings: rounds of sixteen steps by three devices, two of which suffice; all waits at their defaults."""
    return [
        f"model.name={model}", f"federation.rounds={rounds}", "federation.local_steps=16", "federation.batch_size=4",
        "federation.min_nodes=2", "federation.expect_nodes=3", f"federation.evaluate_every={rounds}", "task.max_tokens=96",
        "data.held_out=0.25", "optimizer.lr=0.01",
    ]  # fmt: skip


@dataclass
class Verdict:
    """What became of one fault. Times in seconds since it struck; None: it never came."""

    fault: Fault
    edges: int
    relay: bool
    hit: str
    round: int = 0
    """The last round that was done before."""
    next_round_s: float | None = None
    whole_round_s: float | None = None
    """Until a round was done that had begun after the fault, with all devices in all of its steps."""
    own_rounds: int = 0
    """Rounds, or parts of them, that the struck device lost."""
    others_rounds: int = 0
    """The same of devices that were not struck."""
    attempts: int = 0
    """Attempts at a round that came to nothing."""
    repeated: int = 0
    """Rounds that had been done and were done again."""
    went_on_by_line: bool = False
    """A person had to type the line that the command had printed."""
    hang: bool = False
    """No round within the limit, and the command still there."""
    run_lost: str = ""
    """The run ended, with this reason."""
    orphans: list[str] = field(default_factory=list)
    """Processes that outlived the killed command that had started them."""
    reasons: list[str] = field(default_factory=list)
    """Why nodes were lost, as the run says."""
    said: list[str] = field(default_factory=list)
    """Kinds of events until the end of the recovery."""
    user_saw: list[str] = field(default_factory=list)
    """The command's newest lines, if the run was lost or hung."""
    load: float = 0.0

    def outcome(self) -> str:
        """Returns the worst that it cost, in words."""
        if not self.hit:
            return "hit nothing"
        if self.hang:
            return "HANG"
        if self.run_lost:
            return "run lost"
        if self.repeated:
            return "finished round lost"
        if self.others_rounds:
            return "another device's round lost"
        if self.went_on_by_line:
            return "went on by the printed line"
        if self.own_rounds:
            return "struck device's round lost"
        return "attempt lost, nothing else" if self.attempts else "nothing lost"

    def to_json(self) -> dict[str, Any]:
        """Returns everything worth keeping as plain values; empty values are left out."""
        rest = {
            key: value for key, value in vars(self).items() if key != "fault" and value not in ("", 0, False, [], None)
        }
        return {"fault": str(self.fault), "outcome": self.outcome(), **rest}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Verdict:
        """Returns the verdict that `to_json` wrote."""
        rest = {key: value for key, value in plain.items() if key not in ("fault", "outcome")}
        return Verdict(Fault.of(plain["fault"]), **{"relay": False, "hit": "", **rest})


@dataclass
class RunEnd:
    """How a run ended: its rounds, whether all devices were in all of them, and its adapter beside that of the undisturbed one."""

    name: str
    state: str
    rounds: int
    whole: bool
    cold_starts: int
    """Nodes' rounds after the first that began without the optimizer's moments."""
    adapter: str
    """equal, differs, or what is wrong with it."""
    resumed: bool


class Trial:
    """Faults in one federation, which has been started."""

    def __init__(self, federation: Federation, rounds: int, limit_s: float) -> None:
        """rounds: of each run. limit_s: the longest recovery that is waited for."""
        self._federation, self._rounds, self._limit_s = federation, rounds, limit_s
        self._number = 0
        self._course: Course | None = None
        self._reference: dict[str, np.ndarray] | None = None
        self._typed = 0
        self._pace_s = 6.0
        self.ends: list[RunEnd] = []

    def undisturbed(self) -> list[float]:
        """Does one run without faults, to compare with; returns the seconds of its rounds."""
        course = self._start()
        self._await(lambda: course.ended, _FIRST_ROUND_S + self._rounds * 60.0)
        found = adapter_of(course.folder)
        if isinstance(found, str):
            raise RunFailed(f"the undisturbed run has no adapter: {found}; {self._federation.said('run')[-2000:]}")
        self._reference = found
        seconds = [done.seconds for done in course.rounds]
        self._pace_s = statistics.median(seconds)
        self._end_of_run()
        return seconds

    def verdicts(self, faults: Sequence[Fault]) -> Iterator[Verdict]:
        """Strikes with one fault after the other, each at its moment of a round that follows a whole one."""
        for fault in faults:
            course = self._healthy_run()
            yield self._judge(fault, course)
        if self._course is not None:
            course = self._course
            self._await(lambda: course.ended, self._rounds * 30.0)
            self._end_of_run()

    # ---------------------------------------------------------------- runs

    def _start(self) -> Course:
        self._number += 1
        out = self._federation.folder / "run.out"
        self._typed = out.stat().st_size if out.exists() else 0
        folder = self._federation.start_run(f"run-{self._number}", settings(str(self._federation.model), self._rounds))
        self._course = Course(folder)
        return self._course

    def _healthy_run(self) -> Course:
        """Returns a run with a whole round behind it and rounds before it; starts one if need be."""
        for _ in range(3):
            if self._becomes_healthy(course := self._course or self._start()):
                return course
            if not course.ended and self._rest(course) <= _FEW_ROUNDS:
                self._await(lambda: self._course is None or self._course.ended, self._limit_s)
            self._end_of_run()
        raise RunFailed(f"no run gets going: {self._federation.said('run')[-2000:]}")

    def _becomes_healthy(self, course: Course) -> bool:
        course.look()
        already = len(course.rounds)
        if course.ended or self._rest(course) <= _FEW_ROUNDS:
            return False
        self._await(
            lambda: course.ended or (len(course.rounds) > already and not self._missing(course)), _FIRST_ROUND_S
        )
        return not course.ended and len(course.rounds) > already and not self._missing(course)

    def _rest(self, course: Course) -> int:
        """Returns how many rounds are left."""
        return self._rounds - (course.rounds[-1].round if course.rounds else 0)

    def _missing(self, course: Course) -> bool:
        return bool(devices_missing(course.rounds[-1:], list(self._federation.devices)))

    def _end_of_run(self) -> None:
        """Notes how the run has ended; ends what still runs of it."""
        course, self._course = self._course, None
        assert course is not None
        command = self._federation.commands["run"]
        if not course.ended and command.poll() is None:
            command.send_signal(signal.SIGINT)
        try:
            command.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            command.kill()
            command.wait()
        if not course.ended:
            for process in self._federation.find("serverapp"):
                process.signal(signal.SIGKILL)
        found = adapter_of(course.folder)
        if isinstance(found, dict):
            same = (
                self._reference is not None
                and found.keys() == self._reference.keys()
                and all(np.array_equal(found[name], self._reference[name]) for name in found)
            )
            adapter = "equal" if same else "differs" if self._reference is not None else "finite"
        else:
            adapter = found
        state = "done" if course.ended and not course.failed else course.failed or "ended by nobody"
        nodes = [node for done in course.rounds[1:] for node in [*done.devices, *done.hosts]]
        self.ends.append(
            RunEnd(
                course.folder.name, state, len(course.rounds),
                not devices_missing(course.rounds, list(self._federation.devices)),
                sum(node.moments not in ("kept", "warm") for node in nodes), adapter,
                any("resumed" in kind.lower() for kind in course.said_since(0.0)),
            )
        )  # fmt: skip

    # ---------------------------------------------------------------- a fault

    def _judge(self, fault: Fault, course: Course) -> Verdict:
        federation = self._federation
        time.sleep(fault.moment * self._pace_s)
        course.look()
        before = course.rounds[-1].round
        started_by = {process.pid for process in federation.of_node(fault.victim or course.host)}
        struck_at = time.time()
        struck = strike(fault, federation, course.host)
        verdict = Verdict(
            fault, len(federation.edges), federation.relay, struck.what, before, load=round(os.getloadavg()[0], 1)
        )
        if struck.what:
            self._watch(verdict, struck, course, struck_at, started_by)
        return verdict

    def _watch(self, verdict: Verdict, struck: Struck, course: Course, at: float, before: set[int]) -> None:
        """Watches until a whole round has been done that began after the fault was over, or the limit."""
        fault, devices = verdict.fault, list(self._federation.devices)
        mend, repeated = struck.mend, len(course.repeated_rounds())
        while time.time() < at + self._limit_s + fault.seconds:
            time.sleep(_POLL_S)
            course.look()
            if mend and time.time() > at + RESTART_S:
                mend()
                mend = None
            verdict.went_on_by_line |= self._type_line(course)
            since = course.rounds_since(at)
            whole = [done for done in since if not devices_missing([done], devices)]
            if any((done.time or 0) > at + fault.seconds and done.round > verdict.round + 1 for done in whole):
                break
            if course.ended and mend is None and time.time() > at + fault.seconds:
                break
        else:
            if not course.rounds_since(at):
                verdict.hang = self._federation.commands["run"].poll() is None
                verdict.run_lost = "" if verdict.hang else "nothing went on"
        if fault.action == "kill" and "client" in fault.target:
            self._await(lambda: time.time() > at + _END_S, _END_S)
            verdict.orphans = [str(one) for one in processes(self._federation.mark) if one.pid in before]
        since = course.rounds_since(at)
        whole = [done for done in since if done.round > verdict.round + 1 and not devices_missing([done], devices)]
        verdict.next_round_s = round((since[0].time or 0) - at, 1) if since else None
        verdict.whole_round_s = round((whole[0].time or 0) - at, 1) if whole else None
        missing = [name for _, name in devices_missing(since, devices)]
        verdict.own_rounds = missing.count(fault.victim) if fault.victim else 0
        verdict.others_rounds = len(missing) - verdict.own_rounds
        verdict.attempts = sum(done.attempt - 1 for done in since)
        verdict.repeated = len(course.repeated_rounds()) - repeated
        verdict.reasons = [f"{node}: {reason}"[:200] for node, reason in course.lost_since(at)]
        verdict.said = course.said_since(at)
        verdict.run_lost = verdict.run_lost or course.failed
        if verdict.hang or verdict.run_lost:
            lines = [line.strip() for line in self._federation.said("run").splitlines() if line.strip()]
            verdict.user_saw = lines[-4:]
            self._end_of_run()

    def _type_line(self, course: Course) -> bool:
        """Types the line to go on, if the command has ended with one and its run is not over."""
        command = self._federation.commands["run"]
        if command.poll() is None or (course.ended and not course.failed):
            return False
        said = self._federation.said("run")
        lines = _GO_ON.findall(said[self._typed :])
        if not lines:
            return False
        self._typed = len(said)
        self._federation.go_on(lines[-1])
        return True

    def _await(self, done: Any, seconds: float) -> bool:
        """Waits for what the run's events tell; returns whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._course is not None:
                self._course.look()
            if done():
                return True
            time.sleep(_POLL_S)
        return False
