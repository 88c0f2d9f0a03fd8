"""A federation without a network or models: nodes that answer by hand, behind a grid that stands in for Flower's.

The server's own code runs on it, by a clock that only moves when the server sleeps: no test waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from edgelam_fl.config import RunConfig
from edgelam_fl.flower import from_record, to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.cut import without_cut
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.reading import end_spans, hosted_span
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import EVENTS_FILE
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.checkpoint import Saved, load_newest
from server.exchange import Exchange, ExchangeTiming
from server.global_adapter import first_adapter
from server.hub import NO_HUB, RunHub
from server.replies import KEPT_NODES
from server.roster import Roster
from server.rounds import Rounds
from server.run_folder import RunFolder
from server.run_queue import Ticket
from server.state import FederationState
from tests.support import run_config

LABELS = {"a": 3, "b": 17, "c": 1, "d": 5}


class ByHand:
    """A node that adds 1 to what a device trains and 2 to what a host trains, and remembers what it was sent."""

    def __init__(self, profile: pb.Profile) -> None:
        self.profile, self.plans, self.held = profile, list[pb.Plan](), adapters.Adapter()
        self.sent = list[bool]()
        self.received = list[adapters.Adapter]()
        self.fails: Callable[[pb.Plan], str] = lambda plan: ""
        """Why its part fails; "crash": its ClientApp does."""
        self.kept: list[tuple[int, int]] = []  # its snapshots, as (attempt, steps)
        self.code = ""  # kind of the reason why its part fails
        self.loses: Callable[[pb.Plan | None], bool] = lambda plan: False
        """Whether its ClientApp ends before it has fetched this plan, or a query (None)."""
        self.leaves: Callable[[pb.Plan], bool] = lambda plan: False
        """Whether it is switched off when it gets this plan."""
        self.unavailable: Callable[[pb.Plan], bool] = lambda plan: False
        """Whether Flower answers in its place that it missed its heartbeats."""
        self.loss_sum: Callable[[pb.Plan], float] = lambda plan: 4.0
        """The held-out loss that it measures, as a sum over two labels."""
        self.moves_bytes = 0
        self.by = 1.0
        self.step_s = 0.0
        self.seconds = 0.0  # of its training, as it reports
        self.corrections: list[list[adapters.Adapter]] = []
        self.reports_opposed = ""
        """A device that it, as a host, says to have worked against the others."""

    @property
    def kept_snapshots(self) -> list[pb.StepSnapshot]:
        return [pb.StepSnapshot(attempt=attempt, steps=steps) for attempt, steps in self.kept]

    def work(self, plan: pb.Plan, content: RecordDict) -> tuple[pb.JobReport, list[adapters.Adapter]]:
        self.plans.append(plan)
        self.sent.append("adapter" in content)
        if "adapter" in content:
            self.received.append(from_record(content["adapter"]))
            self.held = {**self.held, **self.received[-1]}
        if adapters.digest(self.held) != plan.adapter_digest:  # it has more layers than it needs now
            hosted = hosted_span(plan)
            spans = [*(end_spans(plan) if plan.routes else []), *([hosted] if hosted is not None else [])]
            self.held = adapters.slice_of(self.held, spans)
        assert adapters.digest(self.held) == plan.adapter_digest
        self.corrections.append([from_record(content[f"correction-{n}"]) for n in range(len(plan.corrections))])
        snapshots = self.kept_snapshots
        if self.fails(plan):
            return pb.JobReport(state="failed", error=self.fails(plan), code=self.code, snapshots=snapshots), []
        report = pb.JobReport(state="done", node=plan.node, role=plan.role, snapshots=snapshots)
        parts, lr_sum = [], sum(plan.optimizer.lrs)
        if plan.routes:
            if self.profile.held_out:
                report.eval_loss_sum, report.eval_labels = self.loss_sum(plan), 2
                report.eval_sums["correct"] = 1
            report.bytes.add(link="entry e", direction="sent", kind="ACT", payload_bytes=self.moves_bytes)
            if plan.steps:
                report.train_seconds = report.compute_seconds = self.seconds
                report.steps.add(counted=True, seconds=self.step_s)
                report.timeline.add(kind="forward", role="device", seconds=0.5)
                report.contributions.add(scope="ends", source=plan.node, weight=LABELS[plan.node], lr_sum=lr_sum)
                parts.append(self.trained(end_spans(plan), self.by))
        hosted = hosted_span(plan)
        if hosted is not None:
            report.host.first_layer, report.host.last_layer = hosted.first, hosted.last
            if self.reports_opposed in [route.device for route in plan.serves]:
                report.host.left_out.add(
                    device=self.reports_opposed, steps=1, reason="gradients against", was_counted=True
                )
            if plan.steps:
                weight = sum(LABELS[route.device] for route in plan.serves)
                report.contributions.add(scope="site", source=plan.site, weight=weight, lr_sum=lr_sum)
                parts.append(self.trained([hosted], 2))
        self.held = self.held | {name: array for part in parts for name, array in part.items()}
        report.adapter_digest = adapters.digest(self.held)
        return report, parts

    def trained(self, spans: list[adapters.Span], by: float) -> adapters.Adapter:
        lora = self.plans[-1].lora
        frozen = {".lora_A.": lora.freeze_a, ".lora_B.": lora.freeze_b, ".cut_B.": True}
        held = adapters.slice_of(self.held, spans)
        return {n: a + np.float32(by) for n, a in held.items() if not any(f and end in n for end, f in frozen.items())}


class HandGrid:
    """Flower's grid, as far as the server uses it."""

    def __init__(self, nodes: Sequence[ByHand]) -> None:
        self.nodes = dict(enumerate(nodes, 1))
        self._waiting: dict[str, Message] = {}
        self._parked: dict[int, RecordDict] = {}  # what a node was handed over, and is to be asked for

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for number, message in enumerate(messages, len(self._waiting)):
            message.metadata.__dict__["_message_id"] = f"m{number}"
            ids.append(message.metadata.message_id)
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, ids: list[str]) -> list[Message]:
        answers = (self._answer(self._waiting[number]) for number in ids)
        return [answer for answer in answers if answer is not None]

    def _answer(self, message: Message) -> Message | None:
        node_id, content = message.metadata.dst_node_id, message.content
        node = self.nodes.get(node_id)
        plan = pb.Plan.FromString(content["plan"]["plan"]) if "plan" in content else None
        if node is None or node.loses(plan):
            return None
        if plan is None:
            found = RecordDict({"profile": ConfigRecord({"profile": node.profile.SerializeToString()})})
            return Message(found, reply_to=message)
        if message.metadata.message_type == "query.kept":
            report = pb.JobReport(state="failed", snapshots=node.kept_snapshots)
            return Message(
                RecordDict({"report": ConfigRecord({"report": report.SerializeToString()})}), reply_to=message
            )
        if node.leaves(plan):
            del self.nodes[node_id]
            return None
        if node.fails(plan) == "crash":
            return Message(Error(code=0, reason="crashed"), reply_to=message)
        if node.unavailable(plan):
            return Message(Error(code=ErrorCode.NODE_UNAVAILABLE, reason="no heartbeat"), reply_to=message)
        if content["plan"].get("wait") == "park":
            self._parked[node_id] = content
            running = pb.JobReport(state="running").SerializeToString()
            return Message(RecordDict({"report": ConfigRecord({"report": running})}), reply_to=message)
        report, parts = node.work(plan, self._parked.pop(node_id, content))
        content = RecordDict({"report": ConfigRecord({"report": report.SerializeToString()})})
        for number, part in enumerate(parts):
            content[f"adapter-{number}"] = to_record(part)
        return Message(content, reply_to=message)


class HandClock:
    """Moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FederationByHand:
    """Devices and edge servers with names of one letter, and the server's rounds over them."""

    def __init__(
        self,
        source: ModelSource,
        folder: Path,
        devices: str,
        edges: str,
        *overrides: str,
        kept_nodes: int = KEPT_NODES,
        generator: np.random.Generator | None = None,
        ticket: Ticket | None = None,
        hub: RunHub = NO_HUB,
    ) -> None:
        self.config: RunConfig = run_config(source.name, "federation.rounds=2", *overrides)
        self.spec = RunSpec(self.config, source)
        self.nodes = {
            name: ByHand(
                pb.Profile(
                    name=name, role=role, address=f"{name}:1", examples=9, held_out=1, protocol_version=PROTOCOL_VERSION
                )
            )
            for names, role in ((devices, pb.DEVICE), (edges, pb.EDGE))
            for name in names
        }
        self._settings: dict[str, Any] = {
            "kept_nodes": kept_nodes,
            "generator": generator,
            "ticket": ticket,
            "hub": hub,
        }
        self.clock = HandClock()
        self.grid: Any = HandGrid(list(self.nodes.values()))
        self._serve(RunFolder(folder, self.spec))
        self.start = without_cut(first_adapter(self.spec))

    def _serve(self, folder: RunFolder, saved: Saved | None = None, attempts_before: int = 0) -> None:
        self.folder = folder
        exchange = Exchange(self.grid, ExchangeTiming(now=self.clock.now, sleep=self.clock.sleep))
        self.roster = Roster(exchange, folder, pb.ProfileRequest(protocol_version=PROTOCOL_VERSION))
        self.rounds = Rounds(
            self.spec,
            exchange,
            self.roster,
            folder,
            "run",
            saved=saved,
            attempts_before=attempts_before,
            **self._settings,
        )

    def go_on(self, stopped: FederationByHand, attempts_before: int = 0) -> None:
        """Becomes another server for a run that stopped: with its folder and its nodes, and nothing else of it."""
        saved, problem = load_newest(stopped.folder.path)
        assert not problem
        self.nodes, self.grid.nodes = stopped.nodes, stopped.grid.nodes
        self._serve(RunFolder.reopened(stopped.folder.path, self.spec, saved), saved, attempts_before)

    def state(self) -> FederationState:
        """Runs all rounds."""
        return self.rounds.run()

    def run(self) -> adapters.Adapter:
        """Runs all rounds; returns the global adapter."""
        return self.state().adapter

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.folder.path / EVENTS_FILE).read_text().splitlines())
        return [event for event in lines if event["event"] == kind]


def moves(result: adapters.Adapter, start: adapters.Adapter) -> dict[int, float]:
    """Returns how far each layer's tensors went, which must be the same for all of them."""
    found: dict[int, float] = {}
    for name, array in result.items():
        by = float(np.mean(array - start[name]))
        assert np.allclose(array - start[name], by, atol=1e-5), "one number per tensor"
        layer = int(name.split(".layers.")[1].split(".")[0])
        assert found.setdefault(layer, round(by, 4)) == round(by, 4)
    return dict(sorted(found.items()))
