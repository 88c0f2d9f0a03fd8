"""The run files under examples/ train: each through the real ServerApp and ClientApp, at its smallest."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as client_app
from edgelam_fl import open_result, read_run_file
from edgelam_fl.bounds import Bounds
from edgelam_fl.config import RunConfig, to_toml
from edgelam_fl.model.source import ModelSource
from edgelam_fl.simulation.fabric import Fabric
from edgelam_fl.simulation.nodes_file import SimulatedNode, write_federation
from edgelam_fl.wire.control import FABRIC_SEPARATOR, ControlServer
from server.app import app as server_app

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(file.name for file in EXAMPLES.glob("*.toml"))
EDGES, DEVICES = ("edge-1",), ("device-1", "device-2", "device-3")
SMALL = [
    "federation.rounds=1", "federation.local_steps=1", "federation.batch_size=4", "federation.wait=park",
    "federation.expect_nodes=3", "task.max_tokens=64", "data.held_out=0.2",
]  # fmt: skip


class Grid:
    """Flower's network: ClientApps are called one after the other, as the simulation engine does with one worker."""

    def __init__(self, fabric: str) -> None:
        self._fabric, self._sent = fabric, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return list(range(1, len(EDGES + DEVICES) + 1))  # one too many says itself that it has no part

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self._sent)}"
            numbers.append(message.metadata.message_id)
            self._sent[numbers[-1]] = message
        return numbers

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        return [self._answer(self._sent[number]) for number in numbers]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        where = Context(1, node, {"partition-id": node - 1}, RecordDict(), {"fabric": self._fabric})
        return client_app(message, where)


@pytest.fixture(scope="module")
def fabric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of one fabric, which plays the nodes of all runs."""
    state = tmp_path_factory.mktemp("fabric")
    control = ControlServer(state, Fabric(seats=2).node, threads=16)
    yield state
    control.stop()


def write_data(config: RunConfig, folder: Path) -> list[SimulatedNode]:
    """One file per device, with the fields and classes of the run file."""
    fields, classes = config.data.fields, config.task.classes
    facts = [SimulatedNode(name=name) for name in EDGES if config.split.host_on == "edge"]
    for number, name in enumerate(DEVICES):
        rows = [
            {fields.prompt: f"What is {number}.{n}?", fields.answer: classes[n % len(classes)] if classes else f"It is {n}."}
            for n in range(12 + number)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        facts.append(SimulatedNode(name=name, data=f"{name}.jsonl"))
    return facts


@pytest.mark.real_model
@pytest.mark.parametrize("name", FILES)
def test_each_trains(
    name: str, fabric: Path, tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("_run_id", "_node_id", "_task_id"):  # Flower sets them in the process of a ServerApp
        monkeypatch.setattr(TaskIdentity, number, 1)
    bounds = Bounds(folder=EXAMPLES / "strategies")  # as if `edgelam run --local` was typed there
    for key, value in bounds.environment().items():
        monkeypatch.setenv(key, value)
    small = [*SMALL, *([] if read_run_file(EXAMPLES / name).task.classes else [f"model.name={tiny.name}"])]
    config = read_run_file(EXAMPLES / name, small)
    write_federation(tmp_path, write_data(config, tmp_path))
    keys = {"command": "run", "run-toml": to_toml(config), "set": "", "out": str(tmp_path / "run")}
    here = Context(1, 0, {}, RecordDict(), keys)
    server_app(Grid(f"{fabric}{FABRIC_SEPARATOR}{tmp_path}"), here)
    assert open_result(tmp_path / "run").config == config


@pytest.mark.processes
def test_the_program_follows_a_run(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, whose imports are done; it starts others, so it is the slow one here: one device and one edge server."""
    data = tmp_path / "ann.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"answer {n}"}) + "\n" for n in range(12)))
    program, folder = EXAMPLES / "run_and_follow.py", tmp_path / "run"
    small = [f"model.name={tiny.name}", "federation.rounds=1", "federation.local_steps=2", "data.held_out=0.2"]
    monkeypatch.setattr(sys, "argv", [str(program), str(data), *small, f"run.out={folder}"])
    runpy.run_path(str(program), run_name="__main__")
    said = capsys.readouterr().out
    assert "ann joined with" in said
    assert "ann: 2 steps, mean loss" in said
    assert re.search(r"^ann: perplexity [0-9.]+ before, [0-9.]+ after$", said, re.MULTILINE)
    assert said.splitlines()[-1] == f"adapter: {folder / 'adapter'}"
