"""Split federated LoRA as a Flower Strategy: it composes a selection, a bandwidth allocator and an aggregation.

A round, top to bottom: `configure_train` (select -> routes -> shares -> a plan a node), messages, `aggregate_train`
(validate -> aggregate per module -> the next round's adapter). Evaluation of an adapter is the first phase of the round
that starts from it; `configure_evaluate` makes the one job after the last round.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.flower import from_record, record_bytes, to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.split.plan import spans_of
from edgelam_fl.wire import edgelam_pb2 as pb
from server.nodes import Nodes
from server.layout import make_layout, who_may_host
from server.plans import RoundFacts, make_plans, planned_steps
from server.reports import describe_round
from server.run_folder import RunFolder
from strategies.base import Candidate, Contribution, Demand, RoundState, load

_ATTEMPTS = 3
_MESSAGES_S = 120.0  # on top of the round's deadline: Flower polls every few seconds and starts a process a message


Reports = dict[str, tuple[pb.JobReport, adapters.Adapter]]


@dataclass
class Round:
    """What a round was planned as, until its replies are in."""

    facts: RoundFacts
    plans: dict[str, pb.Plan]
    sent_bytes: dict[str, int] = field(default_factory=dict)  # adapters, by node
    began: float = field(default_factory=time.monotonic)


class SplitLora(Strategy):
    def __init__(self, config: RunConfig, source: ModelSource, nodes: Nodes, folder: RunFolder, run: str) -> None:
        self.config, self.source, self.nodes, self.folder, self.run = config, source, nodes, folder, run
        self.selection = load("selection", config.strategy.selection)
        self.bandwidth = load("bandwidth", config.strategy.bandwidth)
        self.aggregation = load("aggregation", config.strategy.aggregation)
        self.personal: dict[str, adapters.Adapter] = {}  # source -> tensors it goes on with instead of the global ones
        self.digests: dict[str, str] = {}  # node -> what it holds, as of its last reply
        self.losses: dict[str, float] = {}
        self.step_offset = 0
        self._attempt = 1
        self._open: Round | None = None
        self._missing: dict[str, str] = {}
        self._global: adapters.Adapter = {}

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, timeout: float = 3600, *_: Any, **__: Any
    ) -> Result:
        """Runs `num_rounds` rounds and the evaluation after the last. Raises RunFailed when no attempt at a round succeeds."""
        result, arrays, config = Result(), initial_arrays, ConfigRecord()
        for number in range(1, num_rounds + 1):
            arrays, metrics = self._round(number, arrays, config, grid, timeout)
            result.arrays = arrays
            result.train_metrics_clientapp[number] = metrics
        self._attempt = 1
        self.nodes.refresh(ask_lost=True)
        replies = self._exchange(self.configure_evaluate(num_rounds + 1, arrays, config, grid), timeout)
        evaluated = self.aggregate_evaluate(num_rounds + 1, replies)
        if evaluated is not None:
            result.evaluate_metrics_clientapp[num_rounds + 1] = evaluated
        return result

    def _round(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord]:
        federation = self.config.federation
        for attempt in range(1, _ATTEMPTS + 1):
            self._attempt = attempt
            self._gather(federation.expect_nodes if number == attempt == 1 else 0)
            replies = self._exchange(self.configure_train(number, arrays, config, grid), timeout)
            aggregated, metrics = self.aggregate_train(number, replies)
            if aggregated is not None and metrics is not None:
                return aggregated, metrics
        reasons = "; ".join(f"{name}: {problem}" for name, problem in sorted(self.nodes.problems.items()))
        raise RunFailed(f"round {number} failed {_ATTEMPTS} times: {reasons}")

    def summary(self) -> None:
        """Nothing to log: the run's events and report say it all."""

    # ---------------------------------------------------------------- Flower's four hooks

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure(server_round, arrays, trains=True)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._configure(server_round, arrays, trains=False)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter, or (None, None) where too few devices or not all layers came through."""
        round_, reports = self._read(replies)
        devices = [name for name in reports if round_.plans[name].role == pb.DEVICE]
        hosts_missing = [name for name, plan in round_.plans.items() if plan.role == pb.EDGE and name not in reports]
        contributions = {
            name: Contribution(name, report.labels_trained, tensors)
            for name, (report, tensors) in reports.items()
            if tensors
        }
        if hosts_missing or not contributions or len(devices) < self.config.federation.min_nodes:
            return None, None
        aggregated = self.aggregation.aggregate(list(contributions.values()))
        self._global = {**self._global, **aggregated.tensors}
        self.personal = {
            name: {**self.personal.get(name, {}), **tensors} for name, tensors in aggregated.personal.items()
        }
        self.step_offset += round_.facts.steps
        personal = {name: tensors for name, tensors in self.personal.items() if name in devices}
        where = self.folder.checkpoint(self._global, server_round, self.step_offset, personal)
        metrics = self._close(round_, reports, where)
        return to_record(self._global), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        round_, reports = self._read(replies)
        if not any(report.eval_labels for report, _ in reports.values()):
            raise RunFailed(f"the evaluation after the last round failed: {self.nodes.problems}")
        return self._close(round_, reports, "adapter")

    # ---------------------------------------------------------------- before

    def _gather(self, expected: int) -> None:
        federation = self.config.federation
        self.nodes.gather(federation.min_nodes, expected, self.config.split.hosts, federation.join_deadline_s)

    def _configure(self, number: int, arrays: ArrayRecord, trains: bool) -> list[Message]:
        self._global = from_record(arrays)
        candidates = [
            Candidate(name, self.nodes.profiles[name].examples, self.losses.get(name)) for name in self.nodes.devices()
        ]
        chosen = self.selection.select(
            RoundState(number, candidates, random.Random(f"{self.config.run.seed}/select/{number}"))
        )
        tokens = {name: secrets.token_bytes(16) for name in chosen.names}
        devices = [self.nodes.profiles[name] for name in chosen.names]
        layout = make_layout(
            self.config, self.source, devices, who_may_host(self.config, [*self.nodes.edges(), *devices])
        )
        shares = self.bandwidth.allocate([Demand(name, 1.0, 0.0) for name in chosen.names], 0.0)
        steps = planned_steps(self.config, devices) if trains else 0
        facts = RoundFacts(self.run, number, self._attempt, self.step_offset, steps)
        plans = make_plans(self.config, self.source, facts, self.nodes.profiles, layout, shares, tokens)
        self._open = Round(facts, plans)
        self.folder.emit(
            "plan", round=number, attempt=self._attempt, selected=list(chosen.names), why=dict(chosen.why), shares=dict(shares),
            routes=[_picture(route, self.source.num_layers) for route in layout.routes.values()],
        )  # fmt: skip
        return [self._message(name, plan) for name, plan in plans.items()]

    def _message(self, name: str, plan: pb.Plan) -> Message:
        assert self._open is not None
        needed = adapters.slice_of({**self._global, **self.personal.get(name, {})}, spans_of(plan))
        plan.adapter_digest = adapters.digest(needed)
        content = RecordDict({"plan": ConfigRecord({"plan": plan.SerializeToString()})})
        if self.digests.get(name) != plan.adapter_digest:
            content["adapter"] = to_record(needed)
            self._open.sent_bytes[name] = record_bytes(content["adapter"])
        return self.nodes.message(name, "train" if plan.steps else "evaluate", content)

    def _exchange(self, messages: Iterable[Message], timeout: float) -> list[Message]:
        """Flower's replies; why others did not reply is kept for `_read`."""
        replies, self._missing = self.nodes.exchange(messages, timeout + _MESSAGES_S)
        return list(replies.values())

    # ---------------------------------------------------------------- after

    def _read(self, replies: Iterable[Message]) -> tuple[Round, Reports]:
        """The usable reports by node. Why the others are not is noted and told."""
        assert self._open is not None
        round_ = self._open
        reports: Reports = {}
        problems = dict(self._missing)
        for reply in replies:
            report = pb.JobReport.FromString(reply.content["report"]["report"])
            tensors = from_record(reply.content["adapter"]) if "adapter" in reply.content else {}
            problem = report.error if report.state != "done" else self._problem(round_.plans[report.node], tensors)
            if problem:
                problems[report.node] = problem
            else:
                reports[report.node] = (report, tensors)
        for name in round_.plans:
            if name in reports:
                self.digests[name] = reports[name][0].adapter_digest
                self.nodes.problems.pop(name, None)
                continue
            self.digests.pop(name, None)
            self.nodes.problems[name] = problems.get(name, "no reply")
            self.folder.emit("node_lost", round=round_.facts.round, node=name, reason=self.nodes.problems[name])
            if name in self._missing:
                self.nodes.lose(name)
        return round_, reports

    def _problem(self, plan: pb.Plan, tensors: adapters.Adapter) -> str:
        """Why an update cannot be aggregated: nothing that a node sends is trusted."""
        expected = adapters.slice_of(self._global, spans_of(plan))
        for name, array in tensors.items():
            if name not in expected:
                return f"its update has a tensor {name}, which its plan does not hold"
            if array.shape != expected[name].shape or array.dtype != np.float32:
                return f"its {name} is {array.dtype} {array.shape}, not float32 {expected[name].shape}"
            if not np.isfinite(array).all():
                return f"its {name} holds values that are not finite"
        return ""

    def _close(self, round_: Round, reports: Reports, checkpoint: str) -> MetricRecord:
        """The round's event, and its metrics for Flower."""
        started_from = {name: plan.adapter_digest for name, plan in round_.plans.items()}
        devices, hosts, by_kind = describe_round(round_.sent_bytes, started_from, reports)
        self.folder.emit(
            "round_done", round=round_.facts.round, attempt=round_.facts.attempt, steps=round_.facts.steps,
            seconds=round(time.monotonic() - round_.began, 3), devices=devices, hosts=hosts, bytes_by_kind=by_kind,
            checkpoint=checkpoint,
        )  # fmt: skip
        self.losses.update({device["name"]: device["loss"] for device in devices if device["loss"] is not None})
        labels = sum(report.eval_labels for report, _ in reports.values())
        loss = sum(report.eval_loss_sum for report, _ in reports.values()) / labels if labels else 0.0
        print(f"round {round_.facts.round}: {len(devices)} devices, held-out loss {loss:.4f} at its start", flush=True)
        return MetricRecord({"eval-loss": loss, "num-examples": labels})


def _picture(route: pb.Route, num_layers: int) -> dict[str, Any]:
    return {
        "device": route.device,
        "front": route.front,
        "back_first": route.back_first,
        "num_layers": num_layers,
        "hops": [{"node": hop.node, "first": hop.first, "last": hop.last} for hop in route.hops],
    }
