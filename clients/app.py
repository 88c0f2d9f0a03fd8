"""The Flower ClientApp: hands plans to this node's stage host and answers with the stage host's reports.

Lives in the process of the node's SuperNode, which holds no model, so it stays thin: no torch, no state. The node's state
folder, into which the stage host wrote its endpoint, is the node configuration's `state`. In a simulation one process plays
all stage hosts: the run's `fabric` setting names its state folder, and Flower's number of the node selects the stage host.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edgelam_fl.errors import Restarted
from edgelam_fl.flower import packed_bytes, packed_record
from edgelam_fl.plan.reading import part_id
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import FABRIC_SEPARATOR, ControlClient, NoStageHost, control

_ANSWER_S = 60.0
_PROFILE_S = 600.0  # measuring a layer in every base takes minutes on a fifth of a core
_POLL_S = 30.0
_KEPT_S = 5.0  # for the end of a part that the server has just cancelled
_START_S = 60.0  # for a stage host to be started again
_PAUSE_S = 0.2

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answers with this node's profile."""
    request = pb.ProfileRequest.FromString(message.content["query"]["request"])
    profile = _ask(context, "GetProfile", request, _PROFILE_S)
    return _reply(message, ConfigRecord({"profile": profile.SerializeToString()}))


@app.query("kept")
def kept(message: Message, context: Context) -> Message:
    """Answers which snapshots this node keeps of the round of a plan that it was given: for a server that was started again.

    They are known once the part is over; if that takes more than `_KEPT_S`, none are named.
    """
    plan = pb.Plan.FromString(message.content["plan"]["plan"])
    report = _ask(context, "Wait", pb.WaitRequest(job=part_id(plan), timeout_s=_KEPT_S), _KEPT_S + _ANSWER_S)
    known = _unfinished(plan, report.state, code=report.code)
    known.snapshots.extend(report.snapshots)
    return _reply(message, ConfigRecord({"report": known.SerializeToString()}))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Has the stage host play this node's part in a round: evaluation of the adapter that the round starts from, then training.

    Answers with the report once the part is over, or as soon as it asks for tensors that the node lacks: the same plan then comes
    again, with them. With `wait = "park"` in the message, answers at once with a report of state "running"; the message
    `train.collect` asks for the complete one.
    """
    plan = pb.Plan.FromString(message.content["plan"]["plan"])
    tensors = packed_bytes(message.content["adapter"]) if "adapter" in message.content else b""
    beside = [packed_bytes(message.content[f"correction-{number}"]) for number in range(len(plan.corrections))]
    snapshot = message.content["snapshot"]["states"] if "snapshot" in message.content else b""
    request = pb.SubmitRequest(plan=plan, adapter=tensors, corrections=beside, snapshot=snapshot)
    verdict = _ask(context, "Submit", request, _ANSWER_S)
    if not verdict.accepted:
        report = _unfinished(plan, "failed", verdict.reason, verdict.code)
    elif message.content["plan"].get("wait") == "park":
        report = _unfinished(plan, "running")
    else:
        report = _wait(context, plan)
    return _answer(message, report)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answers like `train`; the plan has no steps, so the adapter is only evaluated."""
    return train(message, context)


@app.train("collect")
def collect(message: Message, context: Context) -> Message:
    """Answers with the report of a part that `train` handed over before, once the part is over."""
    plan = pb.Plan.FromString(message.content["plan"]["plan"])
    return _answer(message, _wait(context, plan))


def _answer(message: Message, report: pb.JobReport) -> Message:
    trained = [part.adapter for part in report.contributions]
    for part in report.contributions:
        part.ClearField("adapter")  # sent beside the report, as a record of arrays
    metrics = MetricRecord({"num-examples": report.labels_trained, "train-seconds": report.train_seconds})
    if report.eval_labels:
        metrics["eval-loss"] = report.eval_loss_sum / report.eval_labels
    reply = _reply(message, ConfigRecord({"report": report.SerializeToString()}))
    reply.content["metrics"] = metrics
    for number, adapter in enumerate(trained):
        reply.content[f"adapter-{number}"] = packed_record(adapter)
    return reply


def _wait(context: Context, plan: pb.Plan) -> pb.JobReport:
    """Returns the report of a part once it is over or lacks tensors, or a failed one after the round's deadline.

    The stage host goes on if this process is killed: the same plan, handed over again, attaches to its part. If the stage host
    itself ends, its part is lost, and the server hears so at once: it need not wait for the next one, which takes seconds to start.
    """
    end = time.monotonic() + plan.deadlines.round_s + _ANSWER_S
    while True:
        request = pb.WaitRequest(job=part_id(plan), timeout_s=_POLL_S)
        try:
            report: pb.JobReport = _ask(context, "Wait", request, _POLL_S + _ANSWER_S, start_s=0.0)
        except NoStageHost:
            return _lost(context, plan)
        if report.state != "running":
            return report
        if time.monotonic() > end:
            return _unfinished(plan, "failed", "the round's deadline has passed")


def _ask(context: Context, method: str, request: Any, timeout_s: float, *, start_s: float = _START_S) -> Any:
    """Returns the stage host's answer. One that ends meanwhile is started again within `start_s`, and is asked in its place: every
    call may be repeated. Raises EnvironmentProblem if it fails, its subclass NoStageHost if none comes.
    """
    end = math.inf
    while True:
        try:
            with _stage_host(context, start_s) as stage_host:
                return stage_host.call(method, request, timeout_s)
        except NoStageHost:
            end = min(end, time.monotonic() + start_s)
            if time.monotonic() >= end:
                raise
            time.sleep(_PAUSE_S)


def _unfinished(plan: pb.Plan, state: str, error: str = "", code: str = "") -> pb.JobReport:
    """Makes a report without results."""
    return pb.JobReport(job=part_id(plan), node=plan.node, role=plan.role, state=state, error=error, code=code)


def _lost(context: Context, plan: pb.Plan) -> pb.JobReport:
    """Makes the report of a part whose stage host has ended, with the snapshots of its round that it has left on the disk."""
    from edgelam_fl.node.snapshots import Snapshots  # what a SuperNode imports, it holds for as long as the node runs

    error = f"the stage host of {plan.node} ended before its part did, and is started again"
    report = _unfinished(plan, "failed", error, Restarted.code)
    if "state" in context.node_config:
        kept = Snapshots(Path(str(context.node_config["state"])), emit=lambda event: None)
        report.snapshots.extend(kept.steps(plan.run, plan.round))
    return report


def _stage_host(context: Context, start_s: float) -> AbstractContextManager[ControlClient]:
    """Opens the control of this node's stage host, for a `with` block. start_s: for one that has not started yet."""
    if "state" in context.node_config:  # a real node's: no run may send it elsewhere
        return control(Path(str(context.node_config["state"])), start_s)
    state, _, federation = str(context.run_config["fabric"]).partition(FABRIC_SEPARATOR)
    return control(Path(state), start_s, f"{federation}{FABRIC_SEPARATOR}{context.node_config['partition-id']}")


def _reply(message: Message, record: ConfigRecord) -> Message:
    name = "profile" if "profile" in record else "report"
    return Message(content=RecordDict({name: record}), reply_to=message)
