"""Measures how much a server's memory grows while the updates of 1,000 devices arrive, and how fast it takes them.

Runs the ServerApp's own round, from the plans to the new adapter, over a stand-in for Flower's grid that makes each reply
on request. A reply is an update of SmolLM2-135M's rank-8 adapter on q and v, and a report without a timeline. Every rule
runs in a process of its own; the baseline is the resident memory once the messages are sent and all free memory is given
back. One rule that has to keep every update is shown for comparison. --smoke: 40 devices, no bars.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from benchmarks.common import Figure, main

DEVICES, KEPT_DEVICES, STEPS = 1000, 100, 10
MEANS, KEEPS = ("fedavg", "rolora", "fedadam"), ("fedmedian",)
BAR = 4.0


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    devices = 40 if smoke else DEVICES
    cases = [(rule, devices) for rule in (MEANS[:1] if smoke else MEANS)]
    figures = []
    for rule, count in cases + ([] if smoke else [(rule, KEPT_DEVICES) for rule in KEEPS]):
        grown, update_bytes, seconds = _measured(rule, count)
        updates = grown / update_bytes
        bar = f"below {BAR:g}" if rule in MEANS and not smoke else None
        what = f"{rule}, {count} devices"
        figures += [
            Figure(f"{what}, resident memory grows by", round(updates, 2), "updates", bar, updates < BAR if bar else None),
            Figure(f"{what}, from the first to the last update", round(seconds, 1), "s"),
            Figure(f"{what}, an update", update_bytes, "bytes"),
        ]  # fmt: skip
    return {"model": "smollm2-135m", "rank": 8, "targets": ["q_proj", "v_proj"], "steps": STEPS}, figures


def _measured(rule: str, devices: int) -> tuple[int, int, float]:
    """Runs a round in a process of its own; returns (bytes grown, bytes of an update, seconds from first to last update)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_round, args=(rule, devices, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError as error:
        raise SystemExit(f"the process of {rule} ended early") from error
    finally:
        process.join()


# ---------------------------------------------------------------- in the measured process


def _round(rule: str, devices: int, result: Connection) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    from edgelam_fl.config import parse_run_file
    from edgelam_fl.model.source import find_model
    from edgelam_fl.plan.spec import RunSpec
    from edgelam_fl.wire import PROTOCOL_VERSION
    from edgelam_fl.wire import edgelam_pb2 as pb
    from server.exchange import Exchange, ExchangeTiming
    from server.roster import Roster
    from server.rounds import Rounds
    from server.run_folder import RunFolder
    from server.state import FederationState

    logging.getLogger("flwr").setLevel(logging.WARNING)
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them in the process of a ServerApp
        setattr(TaskIdentity, name, 1)
    overrides = ["model.name=smollm2-135m", "split.hosts=0", f"strategy.aggregation={rule}", "lora.rank=8"]
    overrides += [f"federation.local_steps={STEPS}", f"federation.min_nodes={devices}"]
    config = parse_run_file("", source="the benchmark", overrides=overrides)
    spec, grid = RunSpec(config, find_model(config.model.name)), Grid(devices)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run = RunFolder(Path(folder), spec)
        exchange = Exchange(grid, ExchangeTiming())
        roster = Roster(exchange, run, pb.ProfileRequest(protocol_version=PROTOCOL_VERSION))
        Rounds(spec, exchange, roster, run, "run").round_after(FederationState())
    result.send((max(grid.resident) - grid.resident[0], grid.update_bytes, grid.last - grid.first))


@dataclass
class Grid:
    """A stand-in for Flower's grid whose devices all answer at once. Records the resident memory around each update."""

    devices: int
    resident: list[int] = field(default_factory=list)
    update_bytes: int = 0
    first: float = 0.0
    last: float = 0.0
    _plans: dict[str, Any] = field(default_factory=dict)
    _start: dict[str, np.ndarray] = field(default_factory=dict)

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.devices + 1))

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        from edgelam_fl.flower import from_record
        from edgelam_fl.wire import edgelam_pb2 as pb

        self._plans.clear()
        for message in messages:
            node = message.metadata.dst_node_id
            if "plan" in message.content:
                self._plans[str(node)] = pb.Plan.FromString(message.content["plan"]["plan"])
                self._start = self._start or from_record(message.content["adapter"])
            else:
                self._plans[str(node)] = None
        return list(self._plans)

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        asked = [number for number in ids if number in self._plans]
        if asked and self._plans[asked[0]] is None:
            return [FlowerMessage(number, self._profile(number)) for number in asked]
        if not self.resident:
            _give_back()
            self.first = time.monotonic()
        found = []
        for number in asked:
            self._note()
            found.append(FlowerMessage(number, self._update(number)))
            self._note()
        self.last = time.monotonic()
        return found

    def _note(self) -> None:
        self.resident.append(psutil.Process().memory_info().rss)

    def _profile(self, number: str) -> Any:
        from flwr.app import ConfigRecord, RecordDict

        from edgelam_fl.wire import PROTOCOL_VERSION
        from edgelam_fl.wire import edgelam_pb2 as pb

        profile = pb.Profile(
            name=f"device-{number}", role=pb.DEVICE, examples=100, held_out=10, protocol_version=PROTOCOL_VERSION
        )
        return RecordDict({"profile": ConfigRecord({"profile": profile.SerializeToString()})})

    def _update(self, number: str) -> Any:
        from flwr.app import ConfigRecord, RecordDict

        from edgelam_fl.flower import to_record
        from edgelam_fl.wire import edgelam_pb2 as pb

        plan = self._plans[number]
        report = pb.JobReport(
            state="done", node=plan.node, role=plan.role, examples=100, eval_labels=50, eval_loss_sum=9
        )
        for step in range(plan.steps):
            report.steps.add(step=step, loss_sum=20.0, labels=10, counted=True)
        report.contributions.add(scope="ends", source=plan.node, weight=10 * plan.steps)
        self.update_bytes = sum(array.nbytes for array in self._start.values())
        trained = {
            name: array + np.float32(int(number))
            for name, array in self._start.items()
            if not (plan.lora.freeze_a if "lora_A" in name else plan.lora.freeze_b)
        }
        report_record = ConfigRecord({"report": report.SerializeToString()})
        return RecordDict({"report": report_record, "adapter-0": to_record(trained)})


class FlowerMessage:
    """The part of Flower's Message that the server reads."""

    def __init__(self, number: str, content: Any) -> None:
        self.metadata, self.content = SimpleNamespace(reply_to_message_id=number, src_node_id=int(number)), content

    def has_error(self) -> bool:
        return False


def _give_back() -> None:
    """Returns glibc's free memory to the system; otherwise later growth would be hidden in memory freed earlier."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main("arriving", measure)
