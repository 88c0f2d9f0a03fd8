"""A stranger's App reaches a node: none of its code runs there. Nobody else on the node's machine can take its tasks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.federation.app_archive import installed_app
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.environment import child_environment
from edgelam_fl.federation.operator import operator_folder
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.federation.template import NODE_ENVIRONMENT
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


def test_s1_s18_a_strangers_app_runs_on_no_node_and_nobody_can_take_its_tasks(tmp_path: Path) -> None:
    """The App calls itself by this App's name, its client part is another, and the server lets it in."""
    port, log, mark, answers = free_port(), tmp_path / "node.log", tmp_path / "mark", tmp_path / "answers.json"
    server, state = f"127.0.0.1:{port}", tmp_path / "node"
    children = [start_superlink("127.0.0.1", port, tmp_path / "server", allow_foreign_apps=True)]
    command = [sys.executable, "-m", "edgelam_fl.federation.supernode", "--server", server, "--name", "ann"]
    try:
        children.append(Child("ann's SuperNode", [*command, "--state", str(state)], log, NODE_ENVIRONMENT, forked=True))
        await_in(log, "SuperNode ID: ", children)
        submit(tmp_path / "app", mark, answers, operator_folder(tmp_path / "server"))
        end = time.monotonic() + WAIT_S
        while not answers.exists():
            check_alive(children, end)
        (reason,) = json.loads(answers.read_text())
        assert "this node runs its own App, edgelam/edgelam-fl" in reason
        assert installed_app().clients[:12] in reason
        assert reason in log.read_text()
        assert not mark.exists()

        node = psutil.Process(children[1].pid)
        assert [at.laddr for at in node.net_connections("inet") if at.status == psutil.CONN_LISTEN] == []
        assert node.children(recursive=True) == []
    finally:
        end_all(children)


def submit(app: Path, mark: Path, answers: Path, operator: Path) -> None:
    """Submits the stranger's App as the operator."""
    for name, text in (("pyproject.toml", PROJECT), ("server/app.py", SERVER), ("clients/app.py", CLIENT % str(mark))):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text, encoding="utf-8")
    for part in ("server", "clients"):
        (app / part / "__init__.py").touch()
    environment = {**child_environment(), "FLWR_HOME": str(operator)}
    done = subprocess.run(
        ["flwr", "run", str(app), "--run-config", f'answers="{answers}"'],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def await_in(log: Path, text: str, children: list[Child]) -> None:
    end = time.monotonic() + WAIT_S
    while text not in log.read_text():
        check_alive(children, end)


def check_alive(children: list[Child], end: float) -> None:
    """Waits a moment; fails if a process has ended or the time is over."""
    assert time.monotonic() < end, [log_tail(child.log) for child in children]
    assert not any(child.ended() for child in children), [child.ended() for child in children]
    time.sleep(0.1)
