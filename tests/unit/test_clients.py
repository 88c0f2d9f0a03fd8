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


def test_the_server_hears_at_once_of_a_part_whose_stage_host_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the snapshots that are left of its round, and before another stage host is there."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    has_ended = Event()

    def wait_and_die(request: pb.WaitRequest) -> pb.JobReport:
        Thread(target=lambda: (server.stop(), has_ended.set())).start()
        has_ended.wait(WAIT_S)
        return pb.JobReport(state="done")  # nobody is there to hear it

    kept = tmp_path / "snapshots" / "run-r" / "steps" / "000003" / "000001" / "ends"
    kept.mkdir(parents=True)
    (kept / "4-5.snap").touch()
    stage_host = {"Submit": lambda request: pb.SubmitReply(accepted=True), "Wait": wait_and_die}
    server = ControlServer(tmp_path, lambda node: stage_host)
    plan = pb.Plan(run="r", round=3, attempt=1, node="a", deadlines=pb.Deadlines(round_s=5)).SerializeToString()
    content = RecordDict({"plan": ConfigRecord({"plan": plan})})
    context = Context(1, 1, {"state": str(tmp_path)}, RecordDict(), {})
    answer = app.train(Message(content, dst_node_id=1, message_type="train"), context)
    report = read_reply(answer.content).report
    assert (report.state, report.code) == ("failed", "restarted")
    assert [(snapshot.attempt, snapshot.steps) for snapshot in report.snapshots] == [(1, 4), (1, 5)]
