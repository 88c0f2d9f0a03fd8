"""A node's part in one job: its plan, its report, and what other threads may do with the part while it is played.

Knows neither how a part is played (`node.play`) nor when (`node.service`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from edgelam_fl.errors import PeerLost, RunFailed
from edgelam_fl.plan.reading import part_id
from edgelam_fl.split.group import Group
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.telemetry.events import Emit, JobEvent, NodeProgress, StepDone
from edgelam_fl.telemetry.events.progress import REPORTING
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.progress import as_message


class Part:
    """One part: played on one thread, cancelled and awaited on any."""

    def __init__(self, plan: pb.Plan, emit: Emit) -> None:
        self.plan, self.id = plan, part_id(plan)
        self.report = pb.JobReport(job=self.id, node=plan.node, role=plan.role, state="running")
        self.group: Group | None = None  # lets links in; None unless the part is that of a host that is ready
        self._emit = emit
        self.steps_over: Callable[[], int] = lambda: self._steps_over  # counts training steps, on any thread
        self._steps_over = 0  # as a device
        self.progress: Callable[[], NodeProgress] = self._before  # where the part is, on any thread
        self._inboxes: list[Inbox] = []  # of the part as a device and as a host
        self._host_inbox: Inbox | None = None
        self._out: dict[str, str] = {}  # nodes that the server has taken out of the job, with its reasons
        self._cancelled = ""  # the reason; empty: not cancelled
        self._changed = threading.Condition()  # guards the four below, and is told of their changes and of `cancel`
        self._is_over = False  # the report is complete
        self._asks: Mapping[str, bytes] | None = None  # digests of what is held, while the part lacks tensors
        self._given: bytes | None = None  # tensors that nobody has taken yet

    def emit(self, event: JobEvent) -> None:
        """Emits an event with the part's name in it."""
        if isinstance(event, StepDone):
            self._steps_over = event.step + 1
        self._emit(replace(event, job=self.id))

    def attach(self, inbox: Inbox, *, of_host: bool = False) -> None:
        """Has `cancel` reach this inbox too, also if the part was cancelled before. `of_host`: and what is said of devices."""
        self._inboxes.append(inbox)
        if of_host:
            self._host_inbox = inbox
            for device, reason in list(self._out.items()):
                inbox.put_out(device, reason)
        if self._cancelled:
            inbox.cancel(self._cancelled)

    def beat(self, epoch: int, progress: NodeProgress) -> pb.Beat:
        """Returns the sign of life of a part that is played by the stage host of this epoch, and is so far."""
        return pb.Beat(epoch=epoch, state=self.report.state, step=self.steps_over(), progress=as_message(progress))

    def _before(self) -> NodeProgress:
        return NodeProgress(steps=self.own_steps)

    @property
    def own_steps(self) -> int:
        """Training steps that the node takes part in."""
        return self.plan.own_steps if self.plan.routes else self.plan.steps

    def hear(self, notice: pb.Notice) -> None:
        """Takes what the server has decided about the job: it is over, for this node or for all, or goes on without others."""
        reason = notice.cancelled or notice.out.get(self.plan.node, "")
        if reason and not self._cancelled:
            self.cancel(reason)
        news = {device: why for device, why in notice.out.items() if device not in self._out}
        self._out.update(news)
        if self._host_inbox is not None:
            for device, why in news.items():
                self._host_inbox.put_out(device, why)

    def check(self) -> None:
        """Raises RunFailed if the part was cancelled."""
        if self._cancelled:
            raise RunFailed(self._cancelled)

    def cancel(self, reason: str) -> None:
        """Ends the part with this reason; a part that still loads its slices ends when it attaches an inbox."""
        with self._changed:
            self._cancelled, self._asks = reason, None
            self._changed.notify_all()
        for inbox in self._inboxes:
            inbox.cancel(reason)

    # ---------------------------------------------------------------- what the server hears

    @property
    def is_over(self) -> bool:
        """Whether the report is complete."""
        return self._is_over

    def end(self) -> None:
        """Says that the report is complete, and lets go of what counted the steps: with it, a slice would stay in memory."""
        self._steps_over, last = self.steps_over(), replace(self.progress(), doing=REPORTING)
        self.steps_over, self.progress = lambda: self._steps_over, lambda: last
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
            given = self._given
            self._asks = self._given = None
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
