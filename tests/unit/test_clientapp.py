"""The threads that answer a SuperNode's tasks with the installed ClientApp, against the state of Flower's own SuperNode."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate import NodeStateFactory

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.app_archive import App, app_alone, archived_app, installed_app, why_refused
from edgelam_fl.federation.clientapp import ClientAppThreads
from edgelam_fl.federation.flower_app import app_folder
from edgelam_fl.flower import from_record, to_record
from tests.support import WAIT_S

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own, in its build
POLL_S = 0.005


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Flower's archive of this App, as a submission brings it."""
    return build_fab_from_disk(app_alone(tmp_path_factory.mktemp("home") / "app"))


class SuperNode:
    """What Flower's main loop does with its state: it stores runs and messages, makes tasks and takes replies."""

    def __init__(self, archive: bytes, name: str = "edgelam/edgelam-fl") -> None:
        self.state: Any = NodeStateFactory(ObjectStoreFactory()).state()
        self.state.set_node_id(7)
        self.archive, self.name = archive, name

    def receive(self, kind: str, content: RecordDict, run_id: int = 1, complete: bool = True) -> Message:
        """Stores a message in Flower's order; `complete`: with its content, which else is to be added by `complete`."""
        fab_hash = self.state.store_fab(Fab("", self.archive, {}))
        self.state.store_run(SimpleNamespace(run_id=run_id, fab_id=self.name, fab_version="0.2.0", fab_hash=fab_hash))
        message = make_message(Metadata(run_id, "", 1, 7, "", "", time.time(), 100.0, kind), content=content)
        message.metadata.__dict__["_message_id"] = message.object_id
        assert self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=run_id, fab_hash=fab_hash)
        self.state.object_store.preregister(run_id, get_object_tree(message))
        self.state.store_message(remove_content_from_message(message))
        if complete:
            self.complete(message)
        return message

    def complete(self, message: Message) -> None:
        for number, part in get_all_nested_objects(message).items():
            self.state.object_store.put(number, part.deflate())

    def reply(self) -> Message:
        """Waits for the next reply and returns it with its content."""
        end = time.monotonic() + WAIT_S
        while not (found := self.state.get_messages_legacy(is_reply=True, limit=1)):
            assert time.monotonic() < end, "no reply"
            time.sleep(POLL_S)
        reply = found[0]
        store, objects = self.state.object_store, dict[str, bytes]()
        pending = [store.get_object_tree(reply.metadata.message_id)]
        while pending:
            tree = pending.pop()
            objects[tree.object_id] = store.get(tree.object_id)
            pending += tree.children
        whole = inflate_object_from_contents(reply.metadata.message_id, objects)
        assert isinstance(whole, Message)
        assert whole.metadata.reply_to_message_id == reply.metadata.reply_to_message_id
        return whole

    def is_at_rest(self) -> bool:
        """Returns whether no task is left: a node that runs for years would keep millions."""
        return not self.state.get_tasks()


@contextmanager
def serving(supernode: SuperNode, app: ClientApp, own: App | None = None) -> Iterator[None]:
    threads = ClientAppThreads(supernode.state, app, own or installed_app(), {"name": "ann", "state": "/s"}, POLL_S)
    stopped = threading.Event()
    serves = threading.Thread(target=threads.serve, args=(stopped.wait,))
    serves.start()
    try:
        yield
    finally:
        stopped.set()
        serves.join()


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(POLL_S)


def echo() -> ClientApp:
    """Answers a query with its arrays doubled and what the node's context holds."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        doubled = {name: 2 * array for name, array in from_record(message.content["arrays"]).items()}
        told = ConfigRecord({**context.node_config, "node": context.node_id, "run settings": len(context.run_config)})
        return Message(RecordDict({"arrays": to_record(doubled), "told": told}), reply_to=message)

    return app


def arrays(value: float = 1.0) -> RecordDict:
    return RecordDict({"arrays": to_record({"a": np.full(3, value, np.float32)})})


def test_a_message_is_answered_with_the_nodes_own_app_and_settings(archive: bytes) -> None:
    supernode = SuperNode(archive)
    with serving(supernode, echo()):
        supernode.receive("query", arrays())
        reply = supernode.reply()
        until(supernode.is_at_rest)
    assert from_record(reply.content["arrays"])["a"].tolist() == [2.0, 2.0, 2.0]
    assert dict(reply.content["told"]) == {"name": "ann", "state": "/s", "node": 7, "run settings": 0}
    assert supernode.state.get_message_processing_duration(reply.metadata.reply_to_message_id) >= 0


def test_a_message_that_is_still_arriving_is_waited_for(archive: bytes) -> None:
    supernode = SuperNode(archive)
    with serving(supernode, echo()):
        message = supernode.receive("query", arrays(), complete=False)
        until(lambda: supernode.state.msg_store[message.metadata.message_id].is_retrieved)
        supernode.complete(message)
        assert from_record(supernode.reply().content["arrays"])["a"].tolist() == [2.0, 2.0, 2.0]


def test_a_message_that_never_arrived_is_forgotten_and_the_next_is_answered(archive: bytes) -> None:
    supernode = SuperNode(archive)
    with serving(supernode, echo()):
        lost = supernode.receive("query", arrays(), complete=False)
        (task,) = supernode.state.get_tasks()
        supernode.state.delete_messages(message_ids=[lost.metadata.message_id])  # as Flower does when pulling fails
        supernode.state.object_store.delete(lost.metadata.message_id)
        supernode.state.finish_task(task.task_id, "failed", "pulling failed")
        supernode.receive("query", arrays(3.0))
        assert from_record(supernode.reply().content["arrays"])["a"].tolist() == [6.0, 6.0, 6.0]
        until(supernode.is_at_rest)


def test_a_message_is_answered_while_another_waits(archive: bytes) -> None:
    supernode, app, freed = SuperNode(archive), echo(), threading.Event()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        freed.wait(WAIT_S)
        return Message(RecordDict(), reply_to=message)

    with serving(supernode, app):
        trains = supernode.receive("train", RecordDict())
        asks = supernode.receive("query", arrays(), run_id=2)
        assert supernode.reply().metadata.reply_to_message_id == asks.metadata.message_id
        freed.set()
        assert supernode.reply().metadata.reply_to_message_id == trains.metadata.message_id


def test_messages_whose_replies_cannot_be_left_take_no_place_for_good(
    archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    supernode = SuperNode(archive)
    with serving(supernode, echo()):
        with monkeypatch.context() as broken:
            tried: list[str] = []
            broken.setattr(supernode.state, "record_message_processing_end", lambda name: tried.append(name) or 1 / 0)
            for run_id in range(1, 21):  # more than are answered at a time
                supernode.receive("query", arrays(float(run_id)), run_id=run_id)
            until(lambda: len(tried) == 2 * 20)  # the reply, then an error reply
        supernode.receive("query", arrays(), run_id=100)
        assert from_record(supernode.reply().content["arrays"])["a"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("query", LookupError("/home/ann/private.jsonl, line 1: 'a secret'"), "LookupError in clientapp.py"),
        ("query", EnvironmentProblem("'a secret'", outward="the stage host is silent"), "the stage host is silent"),
        ("train.unknown", None, "ValueError in clientapp.py"),
    ],
)
def test_s9_an_error_reply_holds_no_value_and_no_path(
    kind: str, error: Exception, said: str, archive: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    supernode, app = SuperNode(archive), ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        raise error

    with serving(supernode, app):
        supernode.receive(kind, RecordDict())
        reply = supernode.reply()
    assert reply.error.reason.startswith(said)
    assert reply.error.reason.endswith("; supernode.log on ann says more")
    assert "secret" not in reply.error.reason
    assert "/" not in reply.error.reason
    assert kind != "query" or "a secret" in caplog.text, "the node's log has it all"


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("stranger/evilapp", False, "'stranger/evilapp' '0.2.0'"),
        ("edgelam/edgelam-fl", True, "install the server's version of edgelam-fl on this node"),
    ],
)
def test_s1_a_run_with_another_app_is_refused_by_name_and_hash(
    name: str, changed: bool, said: str, archive: bytes
) -> None:
    supernode, called, app = SuperNode(archive, name), list[Message](), ClientApp()
    app.query()(lambda message, context: called.append(message) or message)
    own = replace(installed_app(), clients="0123456789abcdef") if changed else installed_app()
    with serving(supernode, app, own):
        supernode.receive("query", arrays())
        reply = supernode.reply()
    assert not called
    assert reply.error.code == 7
    assert said in reply.error.reason
    assert installed_app().clients[:12] in reply.error.reason


def test_the_app_of_a_submission_is_that_of_an_installation(archive: bytes) -> None:
    own = installed_app()
    assert own == archived_app("edgelam/edgelam-fl", own.version, archive)
    assert not why_refused(replace(own, version="9.9"), own), "the same client part does the same"


def test_what_is_no_archive_is_refused() -> None:
    own = installed_app()
    for content in (b"", b"PK\x05\x06", b"no archive"):
        brought = archived_app(own.name, own.version, content)
        assert "no client part" in why_refused(brought, own)


def test_a_nodes_log_and_reply_hold_a_strangers_name_in_bounds() -> None:
    reason = why_refused(App("x/\n" + "y" * 10_000, "1" * 10_000, ""), installed_app())
    assert len(reason) < 400
    assert "\n" not in reason


def test_the_app_folder_holds_what_is_compared() -> None:
    assert (app_folder() / "clients" / "app.py").is_file()
    assert Path(app_folder() / "pyproject.toml").is_file()
