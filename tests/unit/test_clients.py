"""The ClientApp lives in the process of a node's SuperNode, whose memory each import adds to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients import app
from edgelam_fl.flower import to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import ControlServer
from server.replies import read_reply
from tests.support import WAIT_S


@pytest.mark.parametrize("module", ["clients.app", "edgelam_fl.federation.supernode", "server.app"])
def test_the_apps_and_the_process_of_a_client_app_load_neither_torch_nor_transformers(module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    loaded = set(json.loads(done.stdout))
    assert {"flwr", "grpc"} <= loaded
    assert not loaded & {"torch", "transformers", "peft", "gguf", "uvicorn"}


@pytest.mark.parametrize("wait", ["block", "park"])
def test_contributions_travel_as_arrays_beside_the_report(
    wait: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts: list[dict] = [{"m": np.arange(3, dtype=np.float32)}, {"n": np.ones((2, 2), np.float32)}]
    report = pb.JobReport(state="done", node="a", labels_trained=7, eval_loss_sum=6.0, eval_labels=4)
    for scope, tensors in zip(("ends", "site"), parts, strict=True):
        report.contributions.add(scope=scope, source="a", weight=7, adapter=adapters.to_bytes(tensors))
    given = list[pb.SubmitRequest]()
    stage_host = {
        "Submit": lambda request: given.append(request) or pb.SubmitReply(accepted=True),
        "Wait": lambda request: report,
    }
    for name in ("_run_id", "_node_id", "_task_id"):  # Flower sets them for a ServerApp, which sends these messages
        monkeypatch.setattr(TaskIdentity, name, 1)
    plan = pb.Plan(node="a", corrections=[pb.Correction()], deadlines=pb.Deadlines(round_s=5)).SerializeToString()
    content = RecordDict({"plan": ConfigRecord({"plan": plan, "wait": wait})})
    content["adapter"], content["correction-0"] = map(to_record, parts)
    context = Context(1, 1, {"state": str(tmp_path)}, RecordDict(), {})
    server = ControlServer(tmp_path, lambda node: stage_host)
    try:
        answer = app.train(Message(content, dst_node_id=1, message_type="train"), context)
        if wait == "park":
            assert read_reply(answer.content).report.state == "running"
            content = RecordDict({"plan": ConfigRecord({"plan": plan})})
            answer = app.collect(Message(content, dst_node_id=1, message_type="train.collect"), context)
    finally:
        server.stop()

    (request,) = given
    assert request.plan.node == "a"
    sent = [request.adapter, *request.corrections]
    assert [adapters.digest(adapters.from_bytes(data)) for data in sent] == [adapters.digest(part) for part in parts]
    reply = read_reply(answer.content)
    assert [(part.scope, part.weight, part.adapter) for part in reply.report.contributions] == [
        ("ends", 7, b""),
        ("site", 7, b""),
    ]
    assert list(map(adapters.digest, reply.tensors)) == list(map(adapters.digest, parts))
    assert answer.content["metrics"] == {"num-examples": 7, "train-seconds": 0.0, "eval-loss": 6 / 4}


def test_a_stage_host_that_is_started_again_is_asked_in_the_place_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The new one has another token; the part that the first one had is lost, and the server hears of it."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    servers = list[ControlServer]()

    has_ended = Event()

    def wait_and_die(request: pb.WaitRequest) -> pb.JobReport:
        Thread(target=again).start()
        has_ended.wait(WAIT_S)
        return pb.JobReport(state="done")  # nobody is there to hear it

    def again() -> None:
        servers.pop().stop()
        servers.append(ControlServer(tmp_path, lambda node: {"Wait": lambda request: lost}))
        has_ended.set()

    lost = pb.JobReport(state="failed", code="restarted")
    first = {"Submit": lambda request: pb.SubmitReply(accepted=True), "Wait": wait_and_die}
    servers.append(ControlServer(tmp_path, lambda node: first))
    plan = pb.Plan(node="a", deadlines=pb.Deadlines(round_s=5)).SerializeToString()
    content = RecordDict({"plan": ConfigRecord({"plan": plan})})
    context = Context(1, 1, {"state": str(tmp_path)}, RecordDict(), {})
    try:
        answer = app.train(Message(content, dst_node_id=1, message_type="train"), context)
    finally:
        servers.pop().stop()
    assert read_reply(answer.content).report.code == "restarted"
