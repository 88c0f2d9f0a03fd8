"""Who plays a part of a job at this moment, as the hub beside this run's SuperLink hears it; and what the players are told.

Flower's messages reach no node while it plays: this is the only way to it. Knows neither what a plan says nor what is done
about a node that is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.attendance import LEAD_FOLDER, LEAD_SERVICE, LOOK
from edgelam_fl.wire.control import ControlClient
from edgelam_fl.wire.progress import of_message

_LOOK_S = 1.0  # patience with a hub on this machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """A node in a job, as far as the hub has heard of it."""

    silent_s: float
    """Seconds since its newest sign of life. Also grows after its part is over, as nodes attend only while they play."""
    epoch: int
    """Number of its stage host's process."""
    restarted: bool
    """Whether its stage host's process began anew during the job."""
    state: str
    """Of its part: running, done or failed."""
    step: int
    """Training steps of its part that are over."""
    progress: NodeProgress | None = None
    """Where it is in its part, for people; None if it does not say so."""


class Attendance:
    """The hub's account of a job's nodes. For one thread, and one job at a time."""

    def __init__(self, hub_state: Path | None) -> None:
        """`hub_state`: the hub's state folder; None: there is no hub, and nobody is ever seen."""
        self._folder = hub_state / LEAD_FOLDER if hub_state is not None else None
        self._client: ControlClient | None = None
        self._job = ""
        self._epochs: dict[str, int] = {}  # the first of each node in this job, also if the hub began anew since

    @property
    def works(self) -> bool:
        """Whether there is a hub at which nodes attend."""
        return self._folder is not None

    def look(self, job: str, cancelled: str, out: Mapping[str, str]) -> Mapping[str, Presence]:
        """Tells the hub all that the job's nodes are to hear, and returns the nodes that have attended, by name.

        `cancelled`: why the job is over; "": it is not. `out`: why nodes are out of the job, by name: such a node ends its
        part, and hosts no longer wait for such a device. A node that is missing in the answer has not attended, or not since
        the hub began; the answer is empty if the hub does not answer, which says nothing about the nodes. Never raises.
        """
        if self._folder is None:
            return {}
        if job != self._job:
            self._job, self._epochs = job, {}
        try:
            if self._client is None:
                self._client = ControlClient(self._folder, 0.0, service=LEAD_SERVICE)
            request = pb.LookRequest(job=job, cancelled=cancelled, out=out)
            nodes = self._client.call(LOOK, request, _LOOK_S).nodes
        except EnvironmentProblem:
            self.close()  # a hub that was started again has another socket and token
            return {}
        return {name: self._seen(name, node) for name, node in nodes.items()}

    def close(self) -> None:
        """Ends the connection to the hub; the next look opens another one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _seen(self, name: str, node: pb.Attendee) -> Presence:
        first = self._epochs.setdefault(name, node.epoch)
        return Presence(
            silent_s=node.silent_s,
            epoch=node.epoch,
            restarted=node.restarted or node.epoch != first,
            state=node.state,
            step=node.step,
            progress=of_message(node.progress) if node.HasField("progress") else None,
        )


NO_ATTENDANCE = Attendance(None)
