"""A node's part in one job: its plan, its report, and what other threads may do with the part while it is played.

Knows neither how a part is played (`node.play`) nor when (`node.service`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from edgelam_fl.errors import PeerLost, RunFailed
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
        self.group: Group | None = None  # lets links in; None unless the part is that of a host that is ready
        self._emit = emit
        self._inboxes: list[Inbox] = []  # of the part as a device and as a host
        self._cancelled = ""  # the reason; empty: not cancelled
        self._changed = threading.Condition()  # guards the four below, and is told of their changes and of `cancel`
        self._is_over = False  # the report is complete
        self._asks: Mapping[str, bytes] | None = None  # digests of what is held, while the part lacks tensors
        self._given: bytes | None = None  # tensors that nobody has taken yet

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
        with self._changed:
            self._cancelled = reason
            self._changed.notify_all()
        for inbox in self._inboxes:
            inbox.cancel(reason)

    # ---------------------------------------------------------------- what the server hears

    @property
    def is_over(self) -> bool:
        """Whether the report is complete."""
        return self._is_over

    def end(self) -> None:
        """Says that the report is complete."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> pb.JobReport:
        """Returns the report, or one of state "needs" as soon as tensors are asked for, or one of state "running" after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._asks is not None, timeout_s)
            if self._asks is None:
                return self.report
            return pb.JobReport(
                job=self.id, node=self.plan.node, role=self.plan.role, state="needs", held=dict(self._asks)
            )

    def ask(self, held: Mapping[str, bytes], timeout_s: float) -> bytes:
        """Asks the server for tensors, and returns what it sends (safetensors). `held`: the digest of each tensor that is here.

        Raises PeerLost if nothing comes within `timeout_s`, RunFailed if the part is cancelled.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            self._asks, self._given = held, None
            self._changed.notify_all()
            has_come = self._changed.wait_for(
                lambda: self._cancelled or self._given is not None, end - time.monotonic()
            )
            self._asks, given = None, self._given
            if self._cancelled:
                raise RunFailed(self._cancelled)
            if not has_come or given is None:
                raise PeerLost(f"the server did not send the tensors that were asked for within {timeout_s:.0f} s")
            return given

    def give(self, adapter: bytes) -> None:
        """Brings tensors; without effect unless they have been asked for."""
        with self._changed:
            if self._asks is not None:
                self._asks, self._given = None, adapter
                self._changed.notify_all()
