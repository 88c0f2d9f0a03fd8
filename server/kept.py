"""What the hub beside this run's SuperLink keeps of hosts that were lost, for those that take their places."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.hub.kept import kept_states, kept_steps
from edgelam_fl.wire import edgelam_pb2 as pb


@dataclass(frozen=True)
class HubKept:
    """The snapshots in a hub's state folder. What cannot be read there is not there."""

    state: Path | None = None
    """None: there is no hub."""

    def steps(self, plan: pb.Plan) -> list[pb.StepSnapshot]:
        """Lists what is kept of a plan's host in its round, oldest first."""
        with suppress(OSError):
            return kept_steps(self.state, plan) if self.state is not None else []
        return []

    def states(self, plan: pb.Plan, at: pb.StepSnapshot) -> bytes:
        """Returns the snapshot of a plan's host, for SubmitRequest.snapshot; empty if it is gone."""
        with suppress(OSError):
            states = kept_states(self.state, plan, at.attempt, at.steps) if self.state is not None else {}
            return pb.KeptStates(states=states).SerializeToString()
        return b""


NO_HUB_KEPT = HubKept()
