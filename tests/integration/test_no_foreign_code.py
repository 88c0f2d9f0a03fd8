"""A stranger's App reaches the nodes of a running federation: none of its code runs there, and nobody can take a node's task."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from edgelam_fl.federation.flower_app import installed_app
from tests.integration.federation import Federation
from tests.support import WAIT_S

pytestmark = pytest.mark.processes

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "edgelam-fl"
version = "0.2.0"
[tool.flwr.app]
publisher = "edgelam"
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "clients.app:app"
[tool.flwr.app.config]
answers = ""
"""
SERVER = """
import json
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    content = RecordDict({"query": ConfigRecord({"request": b""})})
    asked = set(grid.push_messages(
        [Message(content, dst_node_id=node, message_type="query") for node in grid.get_node_ids()]
    ))
    found = []
    while asked:
        for message in grid.pull_messages(list(asked)):
            asked.discard(message.metadata.reply_to_message_id)
            found.append(message.error.reason if message.has_error() else "answered")
        time.sleep(0.2)
    answers = Path(context.run_config["answers"])
    answers.with_suffix(".part").write_text(json.dumps(found))
    answers.with_suffix(".part").rename(answers)
"""
CLIENT = """
from pathlib import Path
from flwr.clientapp import ClientApp

Path(%r).write_text("a stranger's code ran on a node")
app = ClientApp()
"""


def test_s1_a_strangers_app_runs_on_no_node(federation: Federation, tmp_path: Path) -> None:
    """It calls itself by this App's name and version; its client part is another."""
    app, answers, mark = tmp_path / "app", tmp_path / "answers.json", tmp_path / "mark"
    for name, text in (("pyproject.toml", PROJECT), ("server/app.py", SERVER), ("clients/app.py", CLIENT % str(mark))):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text, encoding="utf-8")
    for part in ("server", "clients"):
        (app / part / "__init__.py").touch()

    federation.flwr("run", str(app), "local", "--run-config", f'answers="{answers}"')
    federation.wait_for(answers.exists, WAIT_S, "the nodes' answers")

    said = json.loads(answers.read_text())
    assert len(said) == len(federation.nodes)
    for reason in said:
        assert "this node runs its own App, edgelam/edgelam-fl" in reason
        assert installed_app().clients[:12] in reason
    assert not mark.exists()


def test_s18_nobody_can_take_a_nodes_task(federation: Federation) -> None:
    """A SuperNode listens nowhere, starts no process and has no secret on its command line; other users can see those."""
    for node in federation.nodes.values():
        process = psutil.Process(node.children["SuperNode"].pid)
        assert [at.laddr for at in process.net_connections("inet") if at.status == psutil.CONN_LISTEN] == []
        assert process.children(recursive=True) == []
        assert "token" not in " ".join(process.cmdline())
