"""A node's part in one job: its plan, its report, and what other threads may do with the part while it is played.

Knows neither how a part is played (`node.play`) nor when (`node.service`).
"""

from __future__ import annotations

import threading
from dataclasses import replace

from edgelam_fl.plan.reading import part_id
from edgelam_fl.split.group import Group
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.telemetry.events import Emit, JobEvent
from edgelam_fl.wire import edgelam_pb2 as pb


class Part:
    """One part: played on one thread, cancelled and awaited on any."""

    def __init__(self, plan: pb.Plan, emit: Emit) -> None:
        self.plan, self.id = plan, part_id(plan)
        self.report = pb.JobReport(job=self.id, node=plan.node, role=plan.role, state="running")
        self.finished = threading.Event()  # set once the report is complete
        self.group: Group | None = None  # lets links in; None unless the part is that of a host that is ready
        self._emit = emit
        self._inboxes: list[Inbox] = []  # of the part as a device and as a host
        self._cancelled = ""  # the reason; empty: not cancelled

    def emit(self, event: JobEvent) -> None:
        """Emits an event with the part's name in it."""
        self._emit(replace(event, job=self.id))

    def attach(self, inbox: Inbox) -> None:
        """Has `cancel` reach this inbox too, also if the part was cancelled before."""
        self._inboxes.append(inbox)
        if self._cancelled:
            inbox.cancel(self._cancelled)

    def cancel(self, reason: str) -> None:
        """Ends the part with this reason; a part that still loads its slices ends when it attaches an inbox."""
        self._cancelled = reason
        for inbox in self._inboxes:
            inbox.cancel(reason)
