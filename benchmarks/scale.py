"""Measures what a large federation costs: the server's processor per node, the control plane's bytes, and a host's time and memory.

Server: the ServerApp's own round, with 1,000 devices that train whole adapters of SmolLM2-135M, over a stand-in for Flower's grid whose own
work is not counted; the second round is measured. Host: 1, 2, 4 and 8 devices over one host, joint, the demo's pieces; each is
compared with what the planner's cost model makes of the run with one device, of which it learns the nodes' speeds as it does in
a run. With all processes on one machine a step also takes at least the work of all nodes over the cores; the formula is the larger
of both. It takes six minutes, and measures time. Draws results/scale.svg. --smoke: 40 devices at the server, one with a tiny random model at a host, no bars, no files.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.arriving import Grid
from benchmarks.common import RESULTS, Figure, main
from benchmarks.compared.bars import bars
from benchmarks.compared.load import Load
from benchmarks.compared.planner import Predictions, on_this_machine, tokens_per_row
from benchmarks.compared.product import product
from edgelam_fl.federation.template import in_fork
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.support import write_data_files, write_tiny_llama

NODES, SMOKE_NODES, STEPS = 1000, 40, 10
MOST_CPU_MS, MOST_OFF = 1.0, 0.2  # the bars
DEVICES, TURNS, HOST_THREADS = (1, 2, 4, 8), 3, 1
MODEL = "smollm2-135m"


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    nodes = SMOKE_NODES if smoke else NODES
    cost = in_fork(server_cost, nodes)
    cpu_ms = 1e3 * cost.cpu_s / nodes
    figures = [
        Figure(
            "server: work per node and round", round(cpu_ms, 3), "CPU ms",
            None if smoke else f"at most {MOST_CPU_MS:g}", None if smoke else cpu_ms <= MOST_CPU_MS,
        ),
        Figure("server: message to a node", round(cost.sent_bytes / nodes), "bytes"),
        Figure("server: answer of a node", round(cost.received_bytes / nodes), "bytes"),
        Figure("server: both ways, a round of all nodes", round(cost.sent_bytes + cost.received_bytes), "bytes"),
    ]  # fmt: skip
    figures += host_figures(smoke)
    return {
        "nodes": nodes,
        "model": MODEL,
        "rank": 8,
        "targets": "q_proj, v_proj",
        "devices per host": DEVICES,
    }, figures


# ---------------------------------------------------------------- the server


@dataclass(frozen=True)
class ServerCost:
    """What a round costs the server."""

    cpu_s: float
    sent_bytes: int  # messages with their plans and adapters, without Flower's headers
    received_bytes: int


def server_cost(nodes: int) -> ServerCost:
    """Runs two rounds of the ServerApp; returns the cost of the second. In a process of its own, which it makes Flower's."""
    from flwr.supercore.task_identity import TaskIdentity

    from edgelam_fl.config import parse_run_file
    from edgelam_fl.model.source import find_model
    from server.exchange import Exchange, ExchangeTiming
    from server.roster import Roster
    from server.rounds import Rounds
    from server.run_folder import RunFolder
    from server.state import FederationState

    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them in the process of a ServerApp
        setattr(TaskIdentity, name, 1)
    overrides = [f"model.name={MODEL}", "split.hosts=0", "lora.rank=8", f"federation.local_steps={STEPS}"]
    config = parse_run_file("", source="the benchmark", overrides=[*overrides, f"federation.min_nodes={nodes}"])
    spec, grid = RunSpec(config, find_model(config.model.name)), CountedGrid(nodes)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run = RunFolder(Path(folder), spec)
        exchange = Exchange(grid, ExchangeTiming())
        rounds = Rounds(
            spec, exchange, Roster(exchange, run, pb.ProfileRequest(protocol_version=PROTOCOL_VERSION)), run, "run"
        )
        state = rounds.round_after(FederationState())
        grid.begin()
        began = time.process_time()
        rounds.round_after(state)
        return ServerCost(time.process_time() - began - grid.own_cpu_s, grid.sent_bytes, grid.received_bytes)


class CountedGrid(Grid):
    """A stand-in whose devices answer with one update and reports of their own; counts its own work, and bytes of messages."""

    def __init__(self, devices: int) -> None:
        super().__init__(devices)
        self.begin()

    def begin(self) -> None:
        self.own_cpu_s, self.sent_bytes, self.received_bytes = 0.0, 0, 0
        self._answer: Any = None

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        made = list(messages)  # the server's work
        began = time.process_time()
        self._start = {}
        numbers = super().push_messages(made)
        self.sent_bytes += sum(_size(message.content) for message in made)
        self.own_cpu_s += time.process_time() - began
        return numbers

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        asked, began = list(ids), time.process_time()
        found = super().pull_messages(asked)
        self.received_bytes += sum(_size(message.content) for message in found)
        self.own_cpu_s += time.process_time() - began
        return found

    def _note(self) -> None:
        self.resident.append(0)

    def _update(self, number: str) -> Any:
        from flwr.app import ConfigRecord, RecordDict

        if self._answer is None:
            self._answer = super()._update("1")
        report = pb.JobReport.FromString(self._answer["report"]["report"])
        report.node = report.contributions[0].source = self._plans[number].node
        record = ConfigRecord({"report": report.SerializeToString()})
        return RecordDict({"report": record, "adapter-0": self._answer["adapter-0"]})


def _size(content: Any) -> int:
    from flwr.common.serde import recorddict_to_proto

    return int(recorddict_to_proto(content).ByteSize())


# ---------------------------------------------------------------- a host


def host_figures(smoke: bool) -> list[Figure]:
    counts, turns = ((1,), 1) if smoke else (DEVICES, TURNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(write_tiny_llama(folder / "tiny")) if smoke else MODEL
        held_out = f"data.held_out={0.1 if smoke else 0.002}"  # one or two examples: rounds begin by measuring them
        settings = (
            "federation.batch_size=4", "split.micro_batches=2", "task.max_tokens=80", held_out,
            "optimizer.lr=2e-3", "split.cuts=auto",
        )  # fmt: skip
        files = write_data_files(folder)[:1] if smoke else write_device_files(folder, max(counts))
        load = Load(model, settings, tuple(files))
        with product(load, folder / "host", host_threads=HOST_THREADS) as all_devices:
            runs, peaks = {count: all_devices.of_devices(count) for count in counts}, dict[int, int]()
            for count, run in runs.items():  # from few to many: a process remembers its peak
                run.step(0)
                peaks[count] = run.reports["edge-1"].peak_rss_bytes
            steps = {count: [run.step(turn + 1) for turn in range(turns)] for count, run in runs.items()}
            predictions = Predictions(load, all_devices.profiles(), runs[1].plans(), runs[1].reports)
    cpu_s = median(step.cpu_s for step in steps[1])
    formula = {count: predictions.cost(count, tokens_per_row(load, steps[count], count)) for count in counts}
    formula_s = {count: on_this_machine(formula[count].step_s, count * cpu_s) for count in counts}
    if not smoke:
        seconds = {}
        for count in counts:
            seconds[f"{count} devices, measured"] = [step.wall_s for step in steps[count]]
            seconds[f"{count} devices, formula"] = [formula_s[count]]
        plot = bars("A step over one host", "seconds", seconds, [name for name in seconds if name.endswith("measured")])
        (RESULTS / "scale.svg").write_text(plot, encoding="utf-8")
    figures = list[Figure]()
    for count in counts:
        step_s = median(step.wall_s for step in steps[count])
        figures += [
            Figure(f"{count} devices: a step", round(step_s, 3), "s"),
            Figure(f"{count} devices: speed of all", round(median(s.per_s for s in steps[count]), 1), "tokens/s"),
            Figure(f"{count} devices: a step by the formula", round(formula_s[count], 3), "s"),
            _near(f"{count} devices: formula over measured step", formula_s[count] / step_s, smoke),
            Figure(f"{count} devices: memory of the host", round(peaks[count] / 1e6), "MB"),
            _near(
                f"{count} devices: formula over measured memory",
                formula[count].hosts[0].memory_bytes / peaks[count],
                smoke,
            ),
        ]
    return figures


def _near(name: str, ratio: float, smoke: bool) -> Figure:
    bar, holds = (None, None) if smoke else (f"within {MOST_OFF:.0%} of 1", abs(ratio - 1) <= MOST_OFF)
    return Figure(name, round(ratio, 3), "", bar, holds)


if __name__ == "__main__":
    from benchmarks import scale  # by the name under which the processes that it starts find its functions

    main("scale", scale.measure)
