"""Answers a node's messages with the ClientApp that is installed there, in the process of the node's SuperNode.

Flower's SuperNode receives messages, keeps a task per message in its state and sends the replies that it finds there. Flower
itself has other processes take the tasks over a Runtime API on a local port; here threads of the same process do, so there is
no port, no secret and no process per message. What a run brings as its App is compared, never unpacked or imported. Knows
neither what the messages say nor what the ClientApp does with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from logging import ERROR, WARNING
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.proto.task_pb2 import Task
from flwr.supercore import log
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supernode.nodestate import NodeState

from edgelam_fl.errors import EdgelamError, for_others
from edgelam_fl.federation.app_archive import App, archived_app, why_refused

_MOST_AT_ONCE = 8  # a SuperNode gives one message after the other; more are there only after it has given one up

_Found = TypeVar("_Found")


class _Gone(Exception):
    """Says that the SuperNode has given a task up."""


class ClientAppThreads:
    """Takes the tasks of one SuperNode's state and answers each on a thread of its own."""

    def __init__(
        self, state: NodeState, app: ClientApp, own: App, settings: Mapping[str, str], poll_s: float = 0.1
    ) -> None:
        """Prepares to serve.

        app: answers every message of a run whose App is `own`; other runs are refused. settings: of the node, for `app`.
        poll_s: seconds between two looks.
        """
        self._state, self._app, self._own, self._poll_s = state, app, own, poll_s
        self._settings: UserConfig = dict(settings)
        self.replied = threading.Event()
        """Is set by each reply; whoever sends the replies clears it."""
        self._lock = threading.Lock()
        self._taken: set[int] = set()

    def serve(self, stopped: Callable[[float], bool]) -> None:
        """Serves until `stopped`, which is asked with the seconds to wait, returns true."""
        while not stopped(self._poll_s):
            for task in self._state.get_tasks(statuses=[Status.PENDING], order_by="pending_at", ascending=True):
                if self._may_take(task):
                    threading.Thread(
                        target=self._answer, args=(task,), name=f"task {task.task_id}", daemon=True
                    ).start()
            self._show_life()

    def _may_take(self, task: Task) -> bool:
        with self._lock:
            if len(self._taken) >= _MOST_AT_ONCE or task.type != TaskType.CLIENT_APP:
                return False
            if not self._state.claim_task(task.task_id):
                return False
            self._taken.add(task.task_id)
            return True

    def _show_life(self) -> None:
        """Has the SuperNode keep the tasks; without a sign of life for a minute it would answer them with an error."""
        with self._lock:
            self._taken = {number for number in self._taken if self._state.acknowledge_task_heartbeat(number)}

    def _is_wanted(self, task: Task) -> bool:
        with self._lock:
            return task.task_id in self._taken and self._state.acknowledge_task_heartbeat(task.task_id)

    def _answer(self, task: Task) -> None:
        """Answers the message of a claimed task: with the ClientApp's reply, or with an error."""
        self._state.activate_task(task.task_id)
        try:
            problem = self._reply_to(task, self._wait(task, lambda: self._message(task)))
            self._state.finish_task(task.task_id, SubStatus.FAILED if problem else SubStatus.COMPLETED, problem)
            self._forget_finished()
        except _Gone:
            log(WARNING, "The SuperNode has given task %d up; nothing is sent.", task.task_id)
        except Exception as error:  # noqa: BLE001 - without a sign of life the SuperNode itself answers, after a minute
            log(ERROR, "No answer to task %d.", task.task_id, exc_info=error)
        finally:
            with self._lock:
                self._taken.discard(task.task_id)

    def _forget_finished(self) -> None:
        """Removes finished tasks from the SuperNode's state, which would keep them as long as the node runs."""
        with self._state.lock_task_store:
            for number, task in list(self._state.task_store.items()):
                if task.status.status == Status.FINISHED:
                    del self._state.task_store[number]

    def _reply_to(self, task: Task, head: Message) -> str:
        """Answers the message with the metadata of `head`; returns the reason of an error reply, "" if the ClientApp has answered."""
        self._state.record_message_processing_start(head.metadata.message_id)
        try:
            content = self._wait(task, lambda: self._content(head))
            problem = self._refusal(task)
            if not problem:
                self._send(task, self._app(_message(head, content), self._context(task)))
                return ""
            log(ERROR, "Refused: %s", problem)
            error = Error(ErrorCode.INVALID_FAB, problem)
        except _Gone:
            raise
        except Exception as raised:  # noqa: BLE001 - whatever it is, the server hears of it and the next message is answered
            log(ERROR, "The ClientApp raised an exception.", exc_info=raised)
            problem = f"{for_others(raised)}; supernode.log on {self._settings['name']} says more"
            is_foreseen = isinstance(raised, EdgelamError)
            error = Error(ErrorCode.UNKNOWN if is_foreseen else ErrorCode.CLIENT_APP_RAISED_EXCEPTION, problem)
        self._send(task, Message(error, reply_to=head))
        return problem

    def _wait(self, task: Task, look: Callable[[], _Found | None]) -> _Found:
        """Returns what `look` finds, as soon as it finds it: Flower makes the task before the message is complete."""
        while True:
            if not self._is_wanted(task):
                raise _Gone
            found = look()
            if found is not None:
                return found
            time.sleep(self._poll_s)

    def _message(self, task: Task) -> Message | None:
        """Takes the run's next message, which has no content yet; None if there is none."""
        found = self._state.get_messages_legacy(run_ids=[task.run_id], is_reply=False, limit=1)
        return found[0] if found else None

    def _content(self, head: Message) -> dict[str, bytes] | None:
        """Takes the objects of the message's content by their ids; None if some have not arrived yet."""
        store, message_id = self._state.object_store, head.metadata.message_id
        tree = store.get_object_tree(message_id)
        content = {part.object_id: store.get(part.object_id) or b"" for part in iterate_object_tree(tree)}
        if not all(content.values()):
            return None
        store.delete(message_id)
        return content

    def _refusal(self, task: Task) -> str:
        run = self._state.get_run(task.run_id)
        assert run is not None  # the SuperNode stores it before it makes tasks of it
        archive = self._state.get_fab(run.fab_hash)
        brought = archived_app(run.fab_id, run.fab_version, archive.content if archive else b"")
        return why_refused(brought, self._own)

    def _context(self, task: Task) -> Context:
        """Returns what the ClientApp is told: this node's settings, and none of the run's."""
        return Context(task.run_id, self._state.get_node_id(), self._settings, RecordDict(), {})

    def _send(self, task: Task, reply: Message) -> None:
        """Leaves a reply where the SuperNode looks for it: first its content, then the message. Raises _Gone."""
        if not self._is_wanted(task):
            raise _Gone
        reply.metadata.__dict__["_message_id"] = reply.object_id
        store = self._state.object_store
        with no_object_id_recompute():
            store.preregister(task.run_id, get_object_tree(reply))
            for number, part in get_all_nested_objects(reply).items():
                store.put(number, part.deflate())
        self._state.record_message_processing_end(reply.metadata.reply_to_message_id)
        self._state.store_message(remove_content_from_message(reply))
        self.replied.set()


def _message(head: Message, content: dict[str, bytes]) -> Message:
    message = inflate_object_from_contents(head.metadata.message_id, content)
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = head.metadata.message_id  # no part of the content, whose hash it is
    return message
