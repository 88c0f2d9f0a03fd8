"""The hub's account of who plays a part: nodes show that they live, the ServerApp beside the hub says what they are to hear.

Everything is in memory. A hub that was started again knows all after one beat of each node and one look of the ServerApp,
who both say the whole of what they have to say each time. Knows neither plans nor what follows from a silence.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from edgelam_fl.hub.passes import read_pass, refuse
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import ATTEND, ATTENDANCE_SERVICE, LEAD_FOLDER, LEAD_SERVICE, LOOK, STATES
from edgelam_fl.wire.control import ControlServer
from edgelam_fl.wire.grpc.services import service_handler
from edgelam_fl.wire.progress import as_message, of_message

_MOST_JOBS = 64  # the one that was named longest ago goes first
_TICK_S, _MOST_TICK_S = 0.5, 1.0


class AwakeClock:
    """Seconds in which this process was able to listen: time in which it stood still counts as no more than one tick.

    Without this a hub that was frozen would take its own silence for that of all nodes.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._lock = now, threading.Lock()
        self._awake_s, self._last = 0.0, now()

    def __call__(self) -> float:
        """Returns the seconds so far. Has to be asked at least once a second."""
        with self._lock:
            now = self._now()
            self._awake_s += min(now - self._last, _MOST_TICK_S)
            self._last = now
            return self._awake_s


@dataclass(slots=True)
class _Node:
    """A node in a job, by its newest beat."""

    at_s: float
    epoch: int
    state: str
    step: int
    progress: pb.NodeProgress | None
    restarted: bool = False


@dataclass(slots=True)
class _Job:
    """What the ServerApp said of a job, and the nodes that attended."""

    notice: pb.Notice = field(default_factory=pb.Notice)
    nodes: dict[str, _Node] = field(default_factory=dict)


class HubAttendance:
    """The two services: nodes attend at the hub's port, a ServerApp leads over a socket in the hub's state folder."""

    def __init__(self, key: bytes, clock: Callable[[], float]) -> None:
        """`key`: the server's secret. `clock`: seconds, as of `AwakeClock`."""
        self._key, self._clock = key, clock
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, _Job] = OrderedDict()  # the one named longest ago first

    def service(self) -> grpc.GenericRpcHandler:
        """Returns the service for nodes."""
        return service_handler(ATTENDANCE_SERVICE, {ATTEND: self.attend})

    def attend(self, beat: pb.Beat, context: grpc.ServicerContext) -> pb.Notice:
        """Notes a node's beat; returns what the node is to hear. The node's token says which part it plays."""
        allowed, _ = read_pass(self._key, ATTEND, context)
        if beat.state not in STATES:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"a state that is none of {', '.join(STATES)}")
        with self._lock:
            job = self._job(allowed.part.rpartition("/")[0])
            older = job.nodes.get(allowed.node)
            restarted = older is not None and (older.restarted or older.epoch != beat.epoch)
            progress = as_message(of_message(beat.progress)) if beat.HasField("progress") else None
            job.nodes[allowed.node] = _Node(self._clock(), beat.epoch, beat.state, beat.step, progress, restarted)
            return job.notice

    def look(self, request: pb.LookRequest) -> pb.LookReply:
        """Notes what a job's nodes are to hear; returns who has attended."""
        with self._lock:
            job, now = self._job(request.job), self._clock()
            job.notice = pb.Notice(cancelled=request.cancelled, out=request.out)
            return pb.LookReply(nodes={name: _attendee(node, now) for name, node in job.nodes.items()})

    def _job(self, name: str) -> _Job:
        job = self._jobs.setdefault(name, _Job())
        self._jobs.move_to_end(name)
        while len(self._jobs) > _MOST_JOBS:
            self._jobs.popitem(last=False)
        return job


def _attendee(node: _Node, now_s: float) -> pb.Attendee:
    return pb.Attendee(
        silent_s=now_s - node.at_s, epoch=node.epoch, restarted=node.restarted, state=node.state, step=node.step,
        progress=node.progress,
    )  # fmt: skip


class Lead:
    """The socket over which a ServerApp leads, and the clock of the attendance, until `stop`."""

    def __init__(self, state: Path, attendance: HubAttendance, clock: AwakeClock) -> None:
        """`state`: the hub's state folder. `clock`: that of the attendance, which is kept going here."""
        (state / LEAD_FOLDER).mkdir(mode=0o700, exist_ok=True)
        self._control = ControlServer(
            state / LEAD_FOLDER, lambda _: {LOOK: attendance.look}, threads=2, service=LEAD_SERVICE
        )
        self._clock, self._stopped = clock, threading.Event()
        threading.Thread(target=self._tick, name="awake", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._control.stop()

    def _tick(self) -> None:
        while not self._stopped.wait(_TICK_S):
            self._clock()
