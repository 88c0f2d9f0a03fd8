"""Has the SuperLink notice at once which messages and replies were lost on their way, so that nobody waits for them.

A SuperNode does one thing after the other: it takes a message, answers it, and asks for the next. A node that asks again has nothing
more to say about what it had before. Knows the names inside Flower that this takes; knows neither nodes nor what messages say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import Message


def give_up_lost_messages(links: Any) -> None:
    """Has a message count as lost once its node asks for another one without having answered it.

    A SuperNode takes one message at a time and asks for the next after its answer. If it asks before, its process was started
    again, or the answer to its last request was lost on the way. Whoever sent the message hears of that at the next look, and
    sends another; Flower would keep silent for as long as the node is here.
    """
    take, store, forget = links.get_message_ins, links.store_message_res, links.delete_messages
    unanswered: dict[int, set[str]] = {}  # ids of the newest messages that a node was given, by the node's number

    def take_next(node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        lost = unanswered.pop(node_id, None) if run_id is None else None  # a node asks for the messages of all runs
        if lost:
            forget(lost)
            for message_id in lost:
                links.object_store.delete(message_id)  # its content, unless the node has taken all of it
        found: list[Message] = take(node_id, limit, run_id=run_id)
        if found and run_id is None:
            unanswered[node_id] = {message.metadata.message_id for message in found}
        return found

    def store_answer(message: Message) -> str | None:
        unanswered.get(message.metadata.src_node_id, set()).discard(message.metadata.reply_to_message_id)
        stored: str | None = store(message)
        return stored

    links.get_message_ins, links.store_message_res = take_next, store_answer


@dataclass(frozen=True, slots=True)
class _Upload:
    """A reply whose tensors a node is sending. missing: their ids in Flower, less those that have arrived."""

    node_id: int
    missing: set[str]


def give_up_lost_replies(links: Any) -> None:
    """Has a reply count as lost once its node asks for a message although tensors of the reply are missing; and mends repeated uploads.

    Whoever waits for the tensors hears at the next look that they will not come; Flower would let them wait for hours. What did arrive
    stays, and is not sent again with another reply. A node whose connection breaks repeats the request in it: a tensor that has
    arrived is welcome twice, while Flower would refuse it, and the node would give its reply up.
    """
    take, register = links.get_message_ins, links.store_message_and_object_tree
    put, get = links.store_object, links.get_object
    uploads: dict[str, _Upload] = {}  # by Flower's session
    abandoned: set[str] = set()  # ids of tensors that nobody is sending

    def end_uploads(node_id: int) -> set[str]:
        """Returns what is missing of a node's replies, which it sends no longer."""
        ended = [session for session, upload in list(uploads.items()) if upload.node_id == node_id]
        return set[str]().union(*(uploads.pop(session).missing for session in ended))

    def take_next(node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        if run_id is None and (lost := end_uploads(node_id)):  # a node asks for the messages of all runs
            abandoned.update(lost.difference(*(upload.missing for upload in list(uploads.values()))))
        found: list[Message] = take(node_id, limit, run_id=run_id)
        return found

    def register_upload(message: Message, tree: Any, session: str) -> tuple[bool, list[str]]:
        stored, missing = register(message, tree, session)
        abandoned.difference_update(missing)
        if missing and message.metadata.reply_to_message_id:
            end_uploads(message.metadata.src_node_id)  # it repeats its request
            uploads[session] = _Upload(message.metadata.src_node_id, set(missing))
        return stored, missing

    def put_once(run_id: int, session: str, object_id: str, content: bytes) -> bool:
        stored: bool = put(run_id, session, object_id, content)
        if stored:
            abandoned.discard(object_id)
            if upload := uploads.get(session):
                upload.missing.discard(object_id)
                if not upload.missing:
                    uploads.pop(session, None)
        return stored or links.object_store.get(object_id) == content

    def get_unless_lost(run_id: int, object_id: str) -> bytes | None:
        content: bytes | None = get(run_id, object_id)
        return None if content == b"" and object_id in abandoned else content

    links.get_message_ins, links.store_message_and_object_tree = take_next, register_upload
    links.store_object, links.get_object = put_once, get_unless_lost
