"""Uploading a result: against a stand-in of the hub's HTTP API, which keeps what it is sent."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load
from typer.testing import CliRunner

from edgelam_fl.cli.main import app
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.model.source import ModelSource
from edgelam_fl.serving.push import Upload, push
from edgelam_fl.serving.results import open_result
from tests.recorded import a_run
from tests.results import write_result

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # the library's own way to send files
TOKEN = "hf_of_a_test"
BIG = ".safetensors"  # goes another way, as on the hub


class Hub:
    """Keeps repositories by name; answers as the hub does, as far as uploading goes."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.asked.append(f"{self.command} {self.path}")
                may = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/large/")
                status, told = hub.answer(self.command, self.path, body) if may else (401, {"error": "bad token"})
                content = json.dumps(told).encode()
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = _answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/large/"):
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            self.private.setdefault(name, asked["visibility"] == "private")
            self.files.setdefault(name, {})
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        name = "/".join(path.removeprefix("/api/models").removeprefix("/").split("/")[:2])
        if name.removesuffix(".git") not in self.private:
            return 404, {"error": "not found"}
        if method == "GET":
            return 200, {"id": name, "private": self.private[name], "siblings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{**mode_of(file["path"]), "shouldIgnore": False} for file in files]}
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [{**each, "actions": self.place_of(each)} for each in objects]}
        assert "/commit/" in path, path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.large[value["oid"]]
        return 200, {"success": True, "commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1"}

    def place_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {"upload": {"href": f"{self.address}/large/{wanted['oid']}"}}


def mode_of(path: str) -> dict[str, str]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(BIG) else "regular"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # whose servers the stand-in has not
    made = Hub()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def run(tmp_path: Path, tiny: ModelSource) -> Path:
    folder = write_result(tmp_path / "run", tiny)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in a_run()), encoding="utf-8")
    (folder / "report.html").write_text("the report", encoding="utf-8")
    return folder


def pushed(run: Path, hub: Hub, name: str = "me/tomatoes", kind: str = "peft", public: bool = False) -> list[str]:
    said: list[str] = []
    place = push(open_result(run), Upload(name, kind, public, endpoint=hub.address), said.append)
    assert place == f"{hub.address}/{name if '/' in name else f'me/{name}'}"
    return said


def test_an_adapter_is_uploaded_whole_and_private(run: Path, hub: Hub) -> None:
    said = pushed(run, hub)
    assert hub.private == {"me/tomatoes": True}
    files = hub.files["me/tomatoes"]
    assert files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()
    assert load(files["adapter_model.safetensors"])
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "peft"
    assert {"tokenizer.json", "tokenizer_config.json", "adapter_config.json"} <= files.keys()
    assert said[0].startswith(f"uploading to me/tomatoes (private), {len(files)} files, ")
    assert {line.strip().partition(",")[0] for line in said[1:-1]} == files.keys()
    assert not list(run.glob(".push*")), "the copy is gone"


def test_the_command_says_what_it_uploads(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    done = CliRunner().invoke(app, ["push", str(run), "me/tomatoes"])
    assert done.exit_code == 0, done.output
    first, *files, nothing_else, last = done.stdout.splitlines()
    assert first.startswith("uploading to me/tomatoes (private), ")
    assert {line.strip().partition(",")[0] for line in files} == hub.files["me/tomatoes"].keys()
    assert nothing_else == "no data, no events and no names of nodes are among them"
    assert last == f"uploaded: {hub.address}/me/tomatoes"


def test_nothing_of_the_run_itself_is_uploaded(run: Path, hub: Hub, tiny: ModelSource) -> None:
    pushed(run, hub)
    sent = b"\0".join(hub.files["me/tomatoes"].values())
    names = {event["node"] for event in a_run() if event["event"] == "node_joined"}
    assert "events.jsonl" not in hub.files["me/tomatoes"]
    assert not [name for name in [*names, "the report", str(tiny.folder.parent)] if name.encode() in sent]
    config = json.loads(hub.files["me/tomatoes"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == config["auto_mapping"]["trained_on"]["model"] == tiny.folder.name


def test_public_is_said_twice_over(run: Path, hub: Hub) -> None:
    pushed(run, hub, public=True)
    assert hub.private == {"me/tomatoes": False}
    with pytest.raises(ConfigError, match=r"me/tomatoes exists, and anybody can read it\. --public"):
        pushed(run, hub)
    assert pushed(run, hub, public=True)[0].startswith("uploading to me/tomatoes (public)")


def test_a_name_without_an_owner_is_the_tokens(run: Path, hub: Hub) -> None:
    assert pushed(run, hub, "tomatoes")[0].startswith("uploading to me/tomatoes (private)")
    assert hub.private == {"me/tomatoes": True}
    hub.private["me/tomatoes"] = False
    with pytest.raises(ConfigError, match="me/tomatoes exists, and anybody can read it"):
        pushed(run, hub, "tomatoes")


def test_a_second_push_adds_a_commit(run: Path, hub: Hub) -> None:
    pushed(run, hub)
    pushed(run, hub, kind="merged")
    assert {"adapter_model.safetensors", "model.safetensors"} <= hub.files["me/tomatoes"].keys()


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/a--b", "me/tom atoes"])
def test_a_wrong_name_is_refused_before_anything_is_asked(run: Path, hub: Hub, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a repository, which is OWNER/NAME"):
        pushed(run, hub, name)
    assert hub.asked == []


def test_without_a_token(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token of the model hub is here: `hf auth login`"):
        pushed(run, hub)
    assert hub.asked == []


def test_a_token_that_the_hub_refuses(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(ConfigError, match=r"the hub refuses the token for me/tomatoes \(401\)"):
        pushed(run, hub)
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached(run: Path, hub: Hub) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub.address = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        with pytest.raises(EnvironmentProblem, match="the hub cannot be used for me/tomatoes"):
            pushed(run, hub)


def test_offline_is_said(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE is set, so nothing is uploaded"):
        pushed(run, hub)
