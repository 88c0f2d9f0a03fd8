"""What the SuperLink does about messages and replies that were lost on their way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_FLWR_AID, ErrorCode
from flwr.server.superlink.linkstate import LinkStateFactory, in_memory_linkstate, sql_linkstate
from flwr.server.superlink.linkstate.utils import verify_message_ids
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.object_store import ObjectStore, ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from edgelam_fl.federation.lost_messages import give_up_lost_messages, give_up_lost_replies


class Messages:
    """Flower's messages to nodes, as far as they are given out, answered and forgotten."""

    def __init__(self, **waiting: int) -> None:
        self.waiting, self.forgotten = waiting, list[str]()
        self.object_store = Mock(spec=ObjectStore)

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Any]:
        name = next((name for name, node in self.waiting.items() if node == node_id), None)
        if name is None:
            return []
        del self.waiting[name]
        return [SimpleNamespace(metadata=SimpleNamespace(message_id=name))]

    def store_message_res(self, message: Any) -> str | None:
        return "an id"

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        self.forgotten += sorted(message_ins_ids)


def reply(node: int, to: str) -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(src_node_id=node, reply_to_message_id=to))


def test_a_message_is_lost_once_its_node_asks_for_another_without_an_answer() -> None:
    links = Messages(first=1, second=1, other=2)
    give_up_lost_messages(links)
    links.get_message_ins(2, 1)
    links.get_message_ins(1, 1)
    links.get_message_ins(7, None, run_id=5)  # as a ServerApp asks
    assert links.forgotten == []
    links.get_message_ins(1, 1)
    assert links.forgotten == ["first"]
    links.object_store.delete.assert_called_once_with("first")
    links.store_message_res(reply(1, "second"))
    links.get_message_ins(1, 1)
    links.get_message_ins(1, 1)
    assert links.forgotten == ["first"]


@pytest.mark.parametrize("state", [in_memory_linkstate.InMemoryLinkState, sql_linkstate.SqlLinkState])
def test_flower_tells_the_sender_of_a_message_that_was_forgotten(state: Any) -> None:
    """As for one that it never had, which the run's process takes for lost (`server.exchange`)."""
    assert {"get_message_ins", "store_message_res", "delete_messages"} <= set(dir(state))
    told = verify_message_ids({"forgotten"}, {}, 5, 0.0)
    assert [message.error.code for message in told.values()] == [ErrorCode.MESSAGE_UNAVAILABLE]


pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # of Flower's database


@dataclass
class Reply:
    """A reply of a node, and its objects by Flower's ids."""

    message: Message
    objects: dict[str, bytes]
    session: str = ""


class Server:
    """A SuperLink's state with a run and two nodes."""

    def __init__(self, database: Path) -> None:
        factory = LinkStateFactory(str(database), NoOpFederationManager(), ObjectStoreFactory(str(database)))
        self.links: Any = factory.state()
        give_up_lost_messages(self.links)
        give_up_lost_replies(self.links)
        fab = self.links.store_fab(Fab("", b"app", {}))
        self.run = self.links.create_run("app", "1", fab, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp")
        self.nodes = [self.links.create_node("one", "one", name, 30.0) for name in (b"one", b"two")]
        for node in self.nodes:
            self.links.activate_node(node, 30.0)

    def reply_of(self, node: int, values: list[float]) -> Reply:
        """Sends the node a message, which it takes, and returns its answer."""
        asked = self._message(RecordDict(), 1, node)
        self.links.store_message_ins(remove_content_from_message(asked))
        (taken,) = self.links.get_message_ins(node, 1)
        arrays = ArrayRecord([np.array(values, dtype=np.float32), np.ones(3, dtype=np.float32)])
        reply = self._message(RecordDict({"arrays": arrays}), node, 1, taken.metadata.message_id)
        return Reply(reply, {name: part.deflate() for name, part in get_all_nested_objects(reply).items()})

    def _message(self, content: RecordDict, source: int, target: int, to: str = "") -> Message:
        metadata = Metadata(self.run, "", source, target, to, "", now().timestamp(), 3600.0, "train")
        message = make_message(metadata=metadata, content=content)
        metadata.__dict__["_message_id"] = message.object_id
        return message

    def register(self, reply: Reply) -> list[str]:
        """Does what the SuperLink does when the node tells of its reply; returns the ids of the objects that it wants."""
        reply.session = self.links.start_session(self.run)
        with no_object_id_recompute():
            tree = get_object_tree(reply.message)
        _, missing = self.links.store_message_and_object_tree(
            remove_content_from_message(reply.message), tree, reply.session
        )
        return list(missing)

    def put(self, reply: Reply, object_id: str) -> bool:
        return bool(self.links.store_object(self.run, reply.session, object_id, reply.objects[object_id]))

    def get(self, object_id: str) -> bytes | None:
        """Returns an object; b"": it is awaited. None: it will not come."""
        found: bytes | None = self.links.get_object(self.run, object_id)
        return found


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "superlink.db")


def test_a_tensor_that_is_sent_twice_is_welcome(server: Server) -> None:
    reply = server.reply_of(server.nodes[0], [1.0, 2.0])
    for object_id in server.register(reply):
        assert server.put(reply, object_id)
        assert server.put(reply, object_id), "the answer to the first request was lost"
    assert not server.links.store_object(server.run, reply.session, "of nobody", b"something")
    assert not server.links.store_object(server.run, reply.session, next(iter(reply.objects)), b"other bytes")


def test_a_reply_is_lost_once_its_node_asks_for_a_message_before_all_tensors_are_here(server: Server) -> None:
    one, two = server.nodes
    lost, other = server.reply_of(one, [1.0, 2.0]), server.reply_of(two, [3.0, 4.0])
    first, *rest = server.register(lost)
    wanted = server.register(other)
    server.put(lost, first)
    assert all(server.get(object_id) == b"" for object_id in rest), "they are on their way"
    server.links.get_message_ins(two, 1)  # a node that is still sending does not ask; this one gives up
    assert all(server.get(object_id) == b"" for object_id in rest), "another node's are"
    server.links.get_message_ins(one, 1)
    assert server.get(first) == lost.objects[first]
    assert [server.get(object_id) for object_id in rest] == [None] * len(rest)
    assert all(server.get(object_id) is None for object_id in wanted)
    again = server.reply_of(one, [1.0, 2.0])
    missing = server.register(again)
    assert first not in missing, "what has arrived is not sent again"
    assert all(server.get(object_id) == b"" for object_id in missing)
    for object_id in missing:
        assert server.put(again, object_id)
    assert {name: server.get(name) for name in again.objects} == again.objects


def test_a_node_that_tells_twice_of_its_reply_sends_it_in_one_upload(server: Server) -> None:
    node = server.nodes[0]
    reply = server.reply_of(node, [1.0, 2.0])
    wanted = server.register(reply)
    assert server.register(reply) == wanted, "the answer to the first request was lost"
    server.links.get_message_ins(server.nodes[1], 1)
    for object_id in wanted:
        assert server.put(reply, object_id)
    server.links.get_message_ins(node, 1)
    assert {name: server.get(name) for name in reply.objects} == reply.objects
