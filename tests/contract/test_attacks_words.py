"""What leaves a device in words: codes, places and counts, whatever a data file, a model folder or a run file set off.

Data, labels, names of columns and paths hold a marker; no message to another machine may.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from edgelam_fl.errors import (
    ConfigError,
    DataError,
    DataFault,
    DoesNotFit,
    EdgelamError,
    EnvironmentProblem,
    ModelError,
    PeerLost,
    UsageError,
    for_others,
)
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.play import NodeHooks
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.telemetry.events import Event, JobDone, of_kind
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.report_words import with_bounded_words
from tests.support import WAIT_S, run_config

MARKER = "LEAK"
ROW = '{"question": "LEAK q%d?", "answer": "LEAK a%d."}\n'
ROWS = "".join(ROW % (n, n) for n in range(4))
CHAT = '{"messages": [{"role": "user", "content": "LEAK q"}, {"role": "assistant", "content": "LEAK a%d"}]}\n'
CLASSES = ["task.kind=classification", "task.classes=['aa', 'bb']"]
VALUES = ["task.kind=channel-prediction"]
NO_TEMPLATE = ["task.template=plain", "task.loss_on=all"]


def channels(shape: tuple[int, ...], value: complex) -> bytes:
    """Returns the bytes of a file of channels that all have this value."""
    file = io.BytesIO()
    np.savez(file, up=np.full(shape, value, np.complex64), speed_kmh=np.ones(shape[0]))
    return file.getvalue()


# fault -> (name of the file, its content, overrides of the run file, the place that is named)
FILES: Mapping[str, tuple[str, str | bytes | None, list[str], str]] = {
    "axes": ("a.npz", channels((4, 20, 8), 1), VALUES, ""),
    "chat": ("a.jsonl", '{"messages": "LEAK"}\n' * 2, [], "line 1"),
    "columns": ("a.csv", "question,answer\nLEAK,a\nLEAK,b,LEAK\n", [], "line 3"),
    "csv": ("a.csv", 'question,answer\n"LEAK"x,b\n', [], "line 2"),
    "empty-field": ("a.jsonl", ROWS + '{"question": ["LEAK"], "answer": "LEAK"}\n', [], "line 5"),
    "few-examples": ("a.jsonl", "", [], ""),
    "folder": ("a-folder", None, [], ""),
    "format": ("a.jsonl", b"PK\x03\x04 LEAK", [], ""),
    "header": ("a.csv", "LEAK,LEAK\na,b\n", [], ""),
    "json": ("a.jsonl", ROWS + "LEAK\n", [], "line 5"),
    "missing-field": ("a.jsonl", '{"LEAK": "LEAK", "answr": "LEAK"}\n' * 2, [], "line 1"),
    "missing-file": ("", None, [], ""),
    "no-answer-fits": (
        "a.jsonl",
        ROWS.replace("LEAK q", "LEAK " * 50),
        ["task.max_tokens=8", "task.too_long=skip"],
        "",
    ),
    "numbers": ("a.npz", channels((4, 20, 8, 2), np.nan), VALUES, "sample 0"),
    "object": ("a.json", '["LEAK", "LEAK"]', [], "example 1"),
    "passages": ("a.txt", "LEAK one\n\nLEAK two\n", [], ""),
    "preference": ("a.jsonl", '{"prompt": "LEAK", "chosen": "LEAK", "rejected": "LEAK"}\n' * 2, [], "line 1"),
    "several-sets": ("sets", None, [], ""),
    "template": ("a.jsonl", CHAT % 1 + CHAT % 2 + CHAT % 3, [], ""),
    "too-long": ("long.jsonl", "LEAK", [], "line 1"),
    "tools": ("a.jsonl", '{"messages": [{"role": "assistant", "tool_calls": "LEAK"}]}\n' * 2, [], "line 1"),
    "turn": ("a.jsonl", '{"messages": [{"role": "LEAK", "content": "LEAK"}]}\n' * 2, [], "line 1"),
    "unknown-class": ("a.jsonl", ROWS, CLASSES, "line 1"),
    "unreadable": ("a-file/LEAK.jsonl", None, [], ""),
    "utf-8": ("a.jsonl", b'{"question": "LEAK \xff"}\n', [], "line 1"),
}


def data_file(tmp_path: Path, name: str, content: str | bytes | None) -> Path:
    folder = tmp_path / f"{MARKER}-clinic"
    folder.mkdir()
    file = folder / (name or "absent.jsonl")
    if name == "sets":
        for part in (f"{MARKER}-train", "test"):
            (file / part).mkdir(parents=True)
            (file / part / "state.json").write_text("{}")
        (file / "dataset_dict.json").write_text("{}")
    elif name == "a-folder":
        file.mkdir()
    elif name.startswith("a-file/"):
        file.parent.touch()
    elif content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    if name.startswith("long."):
        os.truncate(file, 1 << 26)  # one line, most of which is a hole that takes no room on the disk
    return file


def device(file: Path, events: list[Event], hooks: NodeHooks = NodeHooks()) -> StageHost:  # noqa: B008 - frozen
    no_link: Any = None
    return StageHost("ann", no_link, events.append, examples=DeviceExamples(file), hooks=hooks)


def whole_model(source: ModelSource, *overrides: str) -> pb.SubmitRequest:
    """A plan in which the device trains alone."""
    config = run_config(source.name, "split.hosts=0", *overrides)
    profile = pb.Profile(name="ann", role=pb.DEVICE, examples=4)
    spec = RunSpec(config, source)
    layout = make_layout(spec, [profile], [])
    facts = RoundFacts("run", 1, 1, 0, 1)
    plan = make_plans(spec, facts, {"ann": profile}, layout, {}, {"ann": b"secret"})["ann"]
    start = adapters.initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    plan.adapter_digest = adapters.digest(start)
    return pb.SubmitRequest(plan=plan, adapter=adapters.to_bytes(start))


def report_of(node: StageHost, request: pb.SubmitRequest) -> pb.JobReport:
    assert node.submit(request).accepted
    return node.wait(pb.WaitRequest(job="run/1/1/ann", timeout_s=WAIT_S))


def test_every_fault_of_data_has_its_file() -> None:
    assert set(FILES) == set(get_args(DataFault))


@pytest.mark.parametrize("fault", FILES)
def test_s9_no_data_file_speaks_of_its_data(
    fault: str, tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in the profile nor in the report of a part; the node's own log has the whole message."""
    if fault == "template":
        monkeypatch.setattr("edgelam_fl.tasks.chat_template.ChatTemplate.whole", _refusing_template)
    name, content, overrides, place = FILES[fault]
    events: list[Event] = []
    node = device(data_file(tmp_path, name, content), events)
    request = whole_model(tiny, *[word for word in overrides if not word.startswith(("task.kind", "task.classes"))])
    if overrides == CLASSES:
        request.plan.task.kind = "classification"
        request.plan.task.classes.extend(["aa", "bb"])
    if overrides == VALUES:
        request.plan.task.kind = "channel-prediction"
    profile = node.profile(pb.ProfileRequest(protocol_version=PROTOCOL_VERSION, task=request.plan.task))
    if not profile.problem:  # this fault shows when texts become tokens
        assert fault in ("no-answer-fits", "template")
    said = profile.problem or report_of(node, request).error
    where = f" at {place}" if place else ""
    assert said == f"its data cannot be used: {fault}{where}; see stage-host.log on ann"
    sent = profile.SerializeToString()
    if overrides not in (CLASSES, VALUES):  # tiny has no head for classes, and the adapter no modules for values
        report = report_of(node, request)
        assert report.error == said
        sent += report.SerializeToString()
        assert MARKER in next(of_kind(events, JobDone)).error or fault in ("no-answer-fits", "template")
    assert MARKER.encode() not in sent
    assert str(tmp_path).encode() not in sent
    log = capfd.readouterr().err
    assert "DataError" in log
    assert MARKER in log or fault in ("no-answer-fits", "template")


def _refusing_template(*_: Any, **__: Any) -> str:
    raise DataError(f"the model's chat template refuses a chat of {MARKER}", "template")


@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"{MARKER} in /home/{MARKER}"),
        OSError(2, "No such file", f"/home/{MARKER}/data"),
        KeyError(MARKER),
        ModelError(f"/home/{MARKER} is no model"),
        ConfigError(f"template = {MARKER}"),
        EnvironmentProblem(f"/home/{MARKER} cannot be written"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_s9_no_error_of_a_part_speaks_of_the_machine(error: Exception, tiny: ModelSource, tmp_path: Path) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    file = data_file(tmp_path, "a.jsonl", ROWS)
    report = report_of(device(file, [], NodeHooks(load=load)), whole_model(tiny))
    assert report.state == "failed"
    assert MARKER.encode() not in report.SerializeToString()
    assert "see stage-host.log on ann" in report.error


def test_s9_a_model_folder_of_the_plan_is_not_described(tiny: ModelSource, tmp_path: Path) -> None:
    request = whole_model(tiny)
    request.plan.model.name = str(tmp_path / MARKER)
    report = report_of(device(data_file(tmp_path, "a.jsonl", ROWS), []), request)
    assert report.error == (
        "the model cannot be found, read or cut as asked (model); see stage-host.log on ann"
    )  # fmt: skip
    other = whole_model(tiny)
    other.plan.model.digest = "0" * 64
    other.plan.attempt = 2
    node = device(tmp_path / f"{MARKER}-clinic/a.jsonl", [])
    assert node.submit(other).accepted
    said = node.wait(pb.WaitRequest(job="run/1/2/ann", timeout_s=WAIT_S)).error
    assert said.startswith(
        f"model {Path(tiny.name).name} on node ann is not the server's: it is {tiny.digest[:12]} and has to be 000000000000"
    )


def test_s9_only_errors_about_frames_and_peers_are_passed_on_as_they_are() -> None:
    """A class of errors that is new says nothing to others, unless it belongs to the course of a run."""
    text = f"{MARKER} /home/{MARKER}"
    kinds = [UsageError, ConfigError, ModelError, EnvironmentProblem]
    assert not [kind for kind in kinds if MARKER in for_others(kind(text))]
    assert for_others(PeerLost("link a: silent")) == "link a: silent"
    assert for_others(DoesNotFit("2 MB are missing", 2e6)) == "2 MB are missing"
    assert for_others(EnvironmentProblem(text, "its disk is full")) == "its disk is full"
    assert issubclass(DataError, EdgelamError)


def test_s9_a_bug_is_named_by_its_place() -> None:
    try:
        make_task(json.loads("{}"), Path(MARKER))
    except AttributeError as error:
        said = for_others(error)
    assert said.startswith("AttributeError in kinds.py, line ")
    assert said.endswith("(a bug)")


def test_s9_errors_of_a_hosts_part_reach_devices_without_values(tiny: ModelSource) -> None:
    """A host that cannot go on closes its links with a reason, which devices report in turn."""
    from edgelam_fl.node.play import _closing

    class Closes:
        reason = ""

        def close(self, reason: str) -> None:
            self.reason = reason

    group: Any = Closes()
    with pytest.raises(ConfigError), _closing(group, "the round is over"):
        raise ConfigError(f"{MARKER}: {tiny.folder}")
    assert group.reason == "a setting of the run cannot be used (config)"


def test_s5_words_of_a_report_are_bounded_and_printable() -> None:
    """They stand in events, on terminals and in pages."""
    evil = "\x1b[2J<script>" + "x" * 10_000
    row = pb.KindBytes(link=evil, kind=evil, direction=evil)
    report = pb.JobReport(
        state=evil, error=evil, moments=evil, adapter_digest=evil, steps=[pb.StepReport(reason=evil)],
        bytes=[row], timeline=[pb.Interval(kind=evil, role=evil, peer=evil)],
        host=pb.HostPart(bytes=[row], left_out=[pb.HostPart().left_out.add(device=evil, reason=evil)]),
    )  # fmt: skip
    found = with_bounded_words(report)
    words = str(found)
    assert "\x1b" not in words
    assert not found.adapter_digest
    assert max(map(len, [found.error, found.steps[0].reason, found.timeline[0].peer, found.bytes[0].kind])) <= 300
    honest = pb.JobReport(
        adapter_digest="ab" * 32, moments="warm", state="done", timeline=[pb.Interval(kind="send", peer="edge-1")]
    )
    assert with_bounded_words(pb.JobReport.FromString(honest.SerializeToString())) == honest
