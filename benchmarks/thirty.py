"""Measures what the failures of some cost the rest: thirty devices on one host, of which five fail at random in every round.

All stage hosts are in this process, and their links are real gRPC over sockets. Four ways to fail, at a seeded moment: the
device's links break and none is let in again; its part ends with an error before it has dialled; it dies in the middle; it
never gets its plan. What has failed is told to the host as a server tells it: at once if the node says so itself, else after
DEAF_S. Bar: every other device is done, with all of its steps. --rounds N (20). --smoke: six devices, one of them fails, one round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.line import Line
from benchmarks.common import Figure, main
from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Adapter, digest, initial_adapter, slice_of, to_bytes
from edgelam_fl.model.source import find_model
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.making import RoundFacts
from edgelam_fl.plan.reading import part_id, spans_of
from edgelam_fl.telemetry.events import Event, StepDone
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from tests.fleet import Fleet
from tests.support import WAIT_S, run_config, write_data_files, write_tiny_llama

DEVICES, FAILING, STEPS = 30, 5, 6
DEAF_S = 8.0  # a server gives up a node that has said nothing for so long
QUICK_WAYS = ("error", "death")  # which the node itself says
WAYS = (*QUICK_WAYS, "links", "absent")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of who fails, how and when")


class Device:
    """A device of the fleet with its own way to the host, and the failure that is its lot in this round."""

    def __init__(self, name: str, file: Path, host_address: str, attend: Callable[..., Any], stack: ExitStack) -> None:
        self.name, self.failure, self.fails_at = name, "", 0
        self.line = Line(host_address)
        stack.callback(self.line.close)
        self._mend: Callable[[], None] | None = None
        hooks = NodeHooks(around_part=self._around_part)
        self.node = StageHost(
            name, dial, self._hear, examples=DeviceExamples(file), server="127.0.0.1", hooks=hooks,
            attend=partial(attend, name),
        )  # fmt: skip
        stack.callback(self.node.stop)

    def draw(self, failure: str, fails_at: int) -> None:
        """Sets how it fails in this round, and after which step; empty: it does not."""
        if self._mend is not None:
            self._mend()
        self._mend, self.failure, self.fails_at = None, failure, fails_at

    @contextmanager
    def _around_part(self, plan: pb.Plan) -> Iterator[None]:
        if self.failure == "error":
            raise RunFailed(f"{self.name} cannot begin")
        yield

    def _hear(self, event: Event) -> None:
        """On the thread of the part: does what is to happen in the middle of a round."""
        if isinstance(event, StepDone) and event.step == self.fails_at:
            if self.failure == "links":
                self._mend = self.line.refuse(lambda port: True)
            elif self.failure == "death":
                raise RunFailed(f"{self.name} breaks off")


class Attendance:
    """Tells all nodes what a server would, in the place of the hub."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ears: dict[str, Callable[[pb.Notice], object]] = {}
        self._out: dict[str, str] = {}

    def attend(
        self, name: str, hub: str, token: bytes, beat: Callable[[], pb.Beat], hear: Callable[[pb.Notice], object]
    ) -> Any:
        with self._lock:
            self._ears[name] = hear
            hear(pb.Notice(out=self._out))
        return _Nothing()

    def begin(self) -> None:
        with self._lock:
            self._out, self._ears = {}, {}

    def take_out(self, device: str, reason: str) -> None:
        with self._lock:
            self._out[device] = reason
            for ear in self._ears.values():
                ear(pb.Notice(out=self._out))


class _Nothing:
    def close(self) -> None:
        pass


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    devices, failing, rounds = (6, 1, 1) if smoke else (DEVICES, FAILING, options.rounds)
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        files = write_data_files(folder)
        source = find_model(str(write_tiny_llama(folder / "tiny")))
        attendance = Attendance()
        host = StageHost(
            "edge-1", dial, lambda event: None, server="127.0.0.1", attend=partial(attendance.attend, "edge-1")
        )
        stack.callback(host.stop)
        plane = DataPlaneServer("127.0.0.1", 0, host.admit)
        stack.callback(plane.stop)
        own = [
            Device(f"device-{n}", files[n % len(files)], f"127.0.0.1:{plane.port}", attendance.attend, stack)
            for n in range(1, devices + 1)
        ]
        config = run_config(source.name)
        fleet = Fleet(
            source, config, {d.name: d.node for d in own}, {"edge-1": (host, f"127.0.0.1:{plane.port}")}, "thirty"
        )
        start = initial_adapter(source, config.lora.targets, config.lora.rank, config.run.seed)
        lost: list[str] = []
        seconds, quiet_s = [], []
        for number in range(1, rounds + 1):
            for each in own:
                each.draw("", 0)
            if not smoke:
                quiet_s.append(_round(fleet, own, attendance, start, 2 * number)[1])
            drawn = chance.sample(own, failing)
            for each in drawn:
                each.draw(chance.choice(QUICK_WAYS if smoke else WAYS), chance.randrange(STEPS - 1))
            reports, took_s = _round(fleet, own, attendance, start, 2 * number + 1)
            seconds.append(took_s)
            lost += _losses(reports, [each.name for each in drawn])
            print(
                f"round {number}: {took_s:.1f} s, {[(each.name, each.failure) for each in drawn]} {lost[-3:]}",
                flush=True,
            )
    settings = {
        "devices": devices,
        "failing": failing,
        "steps": STEPS,
        "deaf_s": DEAF_S,
        "seed": options.seed,
        "lost": lost[:20],
    }
    none = None if smoke else "none"
    found = [
        Figure("rounds", rounds, ""),
        Figure("failures", rounds * failing, ""),
        Figure("rounds, or steps of them, that a device lost without having failed", len(lost), "", none, None if smoke else not lost),
        Figure("a round in which devices fail, median", round(statistics.median(seconds), 2), "s"),
        Figure("a round in which devices fail, longest", round(max(seconds), 2), "s"),
    ]  # fmt: skip
    if quiet_s:
        found.append(Figure("a round in which none fails, median", round(statistics.median(quiet_s), 2), "s"))
    return settings, found


def _round(
    fleet: Fleet, devices: list[Device], attendance: Attendance, adapter: Adapter, number: int
) -> tuple[dict[str, pb.JobReport], float]:
    """Does one round; returns the reports by node, and its seconds."""
    attendance.begin()
    lines = {device.name: device for device in devices}
    facts = RoundFacts(fleet.name, number, 1, 0, STEPS, hub_port=1, relay_key=b"k" * 32, alone=True)
    plans, jobs = fleet.plans(facts), dict[str, str]()
    began = time.monotonic()
    for name, plan in plans.items():
        device = lines.get(name)
        if device is not None:
            if device.failure == "absent":
                continue
            plan.routes[0].hops[0].address = device.line.address
        tensors = slice_of(adapter, spans_of(plan))
        plan.adapter_digest = digest(tensors)
        node = device.node if device is not None else fleet.hosts[name][0]
        reply = node.submit(pb.SubmitRequest(plan=plan, adapter=to_bytes(tensors)))
        assert reply.accepted, reply.reason
        jobs[name] = part_id(plan)
    watching = [
        threading.Thread(target=_give_up, args=(device, jobs.get(device.name), attendance)) for device in devices if device.failure
    ]  # fmt: skip
    for thread in watching:
        thread.start()
    reports = {}
    for name, job in jobs.items():
        node = lines[name].node if name in lines else fleet.hosts[name][0]
        reports[name] = node.wait(pb.WaitRequest(job=job, timeout_s=WAIT_S))
    took_s = time.monotonic() - began
    for thread in watching:
        thread.join()
    return reports, took_s


def _give_up(device: Device, job: str | None, attendance: Attendance) -> None:
    """Takes a device out once it says that it has failed, or is not heard of."""
    if job is None or device.failure == "links":
        time.sleep(DEAF_S)
        attendance.take_out(device.name, "nothing was heard of it")
    if job is not None:
        report = device.node.wait(pb.WaitRequest(job=job, timeout_s=WAIT_S))
        attendance.take_out(device.name, report.error)


def _losses(reports: dict[str, pb.JobReport], failed: list[str]) -> list[str]:
    """Returns a line per node that has not failed and still is not done, or not with all of its steps."""
    found = []
    for name, report in reports.items():
        if name in failed:
            continue
        if report.state != "done":
            found.append(f"{name}: {report.error}")
        elif report.role == pb.DEVICE and sum(step.counted for step in report.steps) != STEPS:
            found.append(f"{name}: {[step.reason for step in report.steps if not step.counted]}")
    return found


if __name__ == "__main__":
    main("thirty", measure, add_options)
