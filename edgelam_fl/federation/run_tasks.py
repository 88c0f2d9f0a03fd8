"""Starts the processes of runs' tasks at a SuperLink, and decides what becomes of a run whose process has ended.

A run's ServerApp says its last word in the run's events. One that ended without it was killed (by kill -9, for want of memory, with
its SuperLink): its task is made to wait again, so that another process takes it, and goes on from the run's checkpoint. Knows
Flower's tasks and the events that end a run; knows nothing of what a run does.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from click import ClickException
from flwr.cli.install import install_from_fab
from flwr.common.config import get_project_dir
from flwr.common.constant import Status, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.servicer.runtime.runtime_handlers import acquire_task
from flwr.supercore.state.schema.corestate_models import Task as TaskModel
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64
from sqlalchemy import select, update

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import INTERRUPTED, DataError, RunFailed
from edgelam_fl.federation.child import ending_with_this
from edgelam_fl.files import is_held, say
from edgelam_fl.names import AGAIN
from edgelam_fl.telemetry.events import (
    EVENTS_FILE,
    Event,
    EventLog,
    RoundDone,
    RunFailure,
    RunInterrupted,
    read_events,
)
from edgelam_fl.telemetry.run_folder import left
from edgelam_fl.telemetry.summary import ENDED, run_state

SERVERAPP = "flwr-serverapp"
"""The name of Flower's command, and kind of task, for a run's ServerApp."""
MOST_RESTARTS = 3
"""How often a run's ServerApp is started again without a finished round between."""
_POLL_S, _AGAIN_S = 0.25, 2.0
_WAITS_AGAIN = "an earlier process of it has ended"  # among Flower's details of a task: a SuperLink may end before it starts another
_NO_HEARTBEAT = "No heartbeat"  # Flower's words for a task that it gave up because it heard nothing of it


@dataclass(frozen=True)
class RunTask:
    """One task of a run, taken from the SuperLink's state."""

    number: int
    """Flower's id of the task."""
    run: int
    """Flower's id of its run."""
    kind: str
    """The name of Flower's command for it."""
    token: str = ""
    """With which its process shows itself at the SuperLink."""
    again: bool = False
    """Whether an earlier process of it has ended."""


class RunTasks:
    """The tasks of the runs at one SuperLink: takes those that wait, and looks after their processes."""

    def __init__(
        self,
        links: Any,
        start: Callable[[RunTask], subprocess.Popen[bytes]],
        bounds: Bounds,
        say: Callable[[str], None] = lambda text: say(text, sys.stderr),
    ) -> None:
        """`links`: Flower's state of the SuperLink. `start`: starts a task's process. `bounds`: where runs have their folders."""
        self._links, self._start, self._bounds, self._say = links, start, bounds, say
        self._running: list[tuple[RunTask, subprocess.Popen[bytes]]] = []
        self._stopped: SimpleQueue[int] = SimpleQueue()  # Flower's ids of runs

    def serve(self, pause: Callable[[float], object] = time.sleep) -> None:
        """Starts tasks and looks after them; never ends. What fails, as on a database that is locked or full, is said and tried again."""
        has_taken_over = False
        while True:
            try:
                if not has_taken_over:
                    self.take_over()
                    has_taken_over = True
                waits_s = 0.0 if self.look() else _POLL_S
            except Exception as error:  # noqa: BLE001 - without this loop no run goes on, whatever went wrong in it
                self._say(f"the tasks of runs: {type(error).__name__}: {error}; tried again in {_AGAIN_S:g} s")
                waits_s = _AGAIN_S
            pause(waits_s)

    def take_over(self) -> None:
        """Has the runs go on that an earlier SuperLink with the same database left: its processes ended with it."""
        for task in open_tasks(self._links):
            self._conclude(task, "the SuperLink ended")

    def end(self, run: int) -> None:
        """Has the processes of a run that was stopped end at the next look; may be called from any thread.

        Flower tells them with their next heartbeat, half a minute later, and until then they hold the nodes.
        """
        self._stopped.put(run)

    def look(self) -> bool:
        """Starts the task that waits longest, and concludes those whose processes have ended; returns whether one was started."""
        while not self._stopped.empty():
            run = self._stopped.get()
            for process in (process for task, process in self._running if task.run == run):
                process.terminate()
        task = self._take()
        if task is not None:
            self._running.append((task, self._start(task)))
        for pair in [pair for pair in self._running if pair[1].poll() is not None]:
            self._conclude(pair[0], f"its process ended with status {pair[1].returncode}")
            self._running.remove(pair)  # not before: the next look concludes what could not be concluded now
        return task is not None

    def _take(self) -> RunTask | None:
        request = AcquireTaskRequest(supported_task_types=[SERVERAPP, "flwr-simulation"])
        taken = acquire_task(request, self._links)
        if not taken.token:
            return None
        task = taken.task
        return RunTask(task.task_id, task.run_id, task.type, taken.token, was_interrupted(self._links, task.task_id))

    def _conclude(self, task: RunTask, how: str) -> None:
        """Closes a task whose process has ended, or makes it wait again."""
        runs = self._links.get_run_info(run_ids=[task.run])
        if not runs:
            return
        given = {key: str(value) for key, value in runs[0].override_config.items()}
        events = self._bounds.run_folder(given.get("out", ""), f"flwr-{task.run}") / EVENTS_FILE
        history = _readable(events)
        status = runs[0].status
        reason = how if not status.details else f"{how} ({status.details})"
        has_last_word = run_state(history) in ENDED
        if has_last_word or is_held(events.parent):  # held: the folder is another run's
            self._links.finish_task(task.number, SubStatus.FAILED, how)  # if Flower has not heard of its end
            return
        if status.sub_status == SubStatus.STOPPED:
            end_run(events, "its operator stopped it", INTERRUPTED)
            return
        was_killed = status.status != Status.FINISHED or status.details.startswith(_NO_HEARTBEAT)
        restart = restarts(history) + 1
        trains = task.kind == SERVERAPP and given.get("command", "run") in ("run", "resume")
        if was_killed and trains and restart <= MOST_RESTARTS and wait_again(self._links, task):
            self._say(f"run {events.parent.name}: {reason}; its ServerApp is started again")
            emit(events, RunInterrupted(reason=reason, restart=restart))
            return
        self._links.finish_task(task.number, SubStatus.FAILED, reason)
        many = f", for the {restart}th time without a finished round" if restart > MOST_RESTARTS else ""
        self._say(f"run {events.parent.name}: {reason}{many}; it has failed")
        end_run(events, f"the ServerApp ended without a word: {reason}{many}", RunFailed.exit_code)


def unpack_app(links: Any, run: int, say: Callable[[str], None] = lambda text: say(text, sys.stderr)) -> None:
    """Puts a run's App where Flower's processes look for it: whole, in one step. To be called by one thread.

    They take a folder that is there for the App. One that another process was just filling, or that was half-filled when the power
    failed, would end the run, and every later one of the same App. What is wrong with an App is left to the run's own process to say.
    """
    for known in links.get_run_info(run_ids=[run]):
        fab = links.get_fab(known.fab_hash)
        if fab is None:
            continue
        try:
            place = get_project_dir(known.fab_id, known.fab_version, known.fab_hash)
            if _holds(place, fab.content):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=place.parent) as folder:
                made = install_from_fab(fab.content, Path(folder), skip_prompt=True)
                shutil.rmtree(place, ignore_errors=True)
                made.rename(place)
        except (ClickException, OSError, ValueError, zipfile.BadZipFile) as error:
            say(f"the App of run {run} cannot be unpacked: {error}")


def _holds(folder: Path, archive: bytes) -> bool:
    """Returns whether a folder has every file of an App's archive, of its size."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        files = [file for file in opened.infolist() if not file.is_dir() and not file.filename.startswith(".info/")]
    return all((folder / f.filename).is_file() and (folder / f.filename).stat().st_size == f.file_size for f in files)


def start_task(task: RunTask, runtime: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts the process of one task, which ends with this one. The token goes through a pipe: whoever lists processes sees
    their arguments.

    runtime: the options of Flower's command for reaching this SuperLink.
    """
    command = [sys.executable, "-m", "edgelam_fl.federation.task_process", task.kind, *runtime]
    command += ["--parent-pid", str(os.getpid())]
    environment = {**os.environ, **({AGAIN: "1"} if task.again else {})}
    # A ServerApp is killed and not asked: one that is asked tells Flower that its run has failed, but the run is to go on. In a
    # session of its own, as whoever ends the SuperLink sends its signal to the whole session. A simulation has children to end.
    is_killed = task.kind == SERVERAPP
    whole = ending_with_this(command, signal.SIGKILL if is_killed else signal.SIGTERM)
    process = subprocess.Popen(whole, stdin=subprocess.PIPE, env=environment, start_new_session=is_killed)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # it may have died already
        pipe.write(task.token.encode())
    return process


# ---------------------------------------------------------------- Flower's state


def open_tasks(links: Any) -> list[RunTask]:
    """Returns the tasks that some process had taken and that have not ended. A SuperLink without a database has none at its start."""
    if not isinstance(links, SqlLinkState):
        return []
    with links.session() as session:
        query = select(TaskModel).where(TaskModel.starting_at.is_not(None), TaskModel.finished_at.is_(None))
        return [
            RunTask(int64_to_uint64(row.task_id), int64_to_uint64(row.run_id), row.type)
            for row in session.scalars(query)
        ]


def wait_again(links: Any, task: RunTask) -> bool:
    """Makes a task wait for a process as if none had taken it, but with a note that one had; forgets the messages of its run. Returns
    whether it does.

    Flower has no word for it: a task that has run is never taken again. What nodes still send for messages of the earlier
    process is dropped, as nobody asks for it.
    """
    if not isinstance(links, SqlLinkState):
        return False
    links.cleanup_run(task.run)
    blank = {"token": None, "active_until": None, "starting_at": None, "running_at": None, "finished_at": None}
    with links.session() as session:
        where = TaskModel.task_id == uint64_to_int64(task.number)
        session.execute(update(TaskModel).where(where).values(sub_status="", details=_WAITS_AGAIN, **blank))
    return True


def was_interrupted(links: Any, number: int) -> bool:
    """Returns whether an earlier process of a task has ended, be it that of an earlier SuperLink."""
    if not isinstance(links, SqlLinkState):
        return False
    with links.session() as session:
        query = select(TaskModel.details).where(TaskModel.task_id == uint64_to_int64(number))
        return bool(session.scalar(query) == _WAITS_AGAIN)


# ---------------------------------------------------------------- a run's events


def restarts(events: Iterable[Event]) -> int:
    """Returns how often the run's ServerApp was started again since the last finished round."""
    count = 0
    for event in events:
        count = 0 if isinstance(event, RoundDone) else event.restart if isinstance(event, RunInterrupted) else count
    return count


def end_run(events: Path, reason: str, exit_code: int) -> None:
    """Says in a run's events that it ended early, in the place of its ServerApp."""
    emit(events, RunFailure(reason=reason, kept=left(events.parent), exit_code=exit_code))


def emit(events: Path, event: Event) -> None:
    """Adds an event to a run's file; if there is no such folder, nobody waits for it."""
    with suppress(OSError):
        if events.parent.is_dir():
            EventLog(events)(event)


def _readable(events: Path) -> list[Event]:
    try:
        return list(read_events(events))
    except (OSError, DataError):
        return []
