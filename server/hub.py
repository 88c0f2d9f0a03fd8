"""The hub beside this run's SuperLink (edgelam_fl.hub), as the environment names it. Without a hub, nothing is offered."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl import hub
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.hub.slices import offered
from edgelam_fl.model.source import ModelSource
from server.attendance import NO_ATTENDANCE, Attendance
from server.kept import NO_HUB_KEPT, HubKept


@dataclass(frozen=True)
class RunHub:
    """What a run's plans say about the hub."""

    port: int = 0  # 0: there is no hub, or it is not this server's
    relay_key: bytes = b""  # signs the nodes' tokens for the relay and the attendance
    slices_token: bytes = b""  # lets nodes fetch slices of the run's model
    attendance: Attendance = NO_ATTENDANCE
    kept: HubKept = NO_HUB_KEPT  # what hosts have left there

    def free(self, jobs: Iterable[str]) -> None:
        """Tells the nodes that still play for runs that were killed that nobody waits for them."""
        for job in jobs:
            self.attendance.look(job, "its run has ended", {})


NO_HUB = RunHub()


@contextmanager
def run_hub(source: ModelSource) -> Iterator[RunHub]:
    """Lets nodes that lack the model fetch slices of it from the hub until the block ends; yields what plans need."""
    port = int(os.environ.get(hub.PORT) or 0)
    if not port:
        yield NO_HUB
        return
    state = Path(os.environ[hub.STATE])
    with offered(source, state) as token:
        yield RunHub(port, relay_key(state), token, Attendance(state), HubKept(state))
