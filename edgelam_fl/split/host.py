"""A host's part in one round: forward and backward for several devices, and one joint optimizer step.

Knows layers, adapters and gradients; knows nothing about tokens or labels beyond their counts, and nothing about gRPC.
Neighbours: `wire.link` brings frames in, `split.daemon` starts this and lets devices in through `admit`.

The compute thread takes, in this order: what control frames say, backward passes, the optimizer step, the forward pass of
the device that waited longest. So an admitted micro-batch never waits for another one's memory.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from edgelam_fl.errors import PeerLost, ProtocolError, RunFailed
from edgelam_fl.model.stage import Stage
from edgelam_fl.split.job import Inbox, Lost, job_id
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Frame, Link

_LATE_STEPS_ALLOWED = 3
_RETRY_MS = 200

Gradients = list[torch.Tensor | None]


@dataclass
class Member:
    """One device of the group, as its host sees it."""

    route: pb.Route
    entry: Link | None = None
    exit: Link | None = None
    table: list[pb.StepRow] | None = None
    forwards: deque[Frame] = field(default_factory=deque)
    saved: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict
    )  # unit: input, output
    gradients: Gradients | None = None  # accumulated over the open step's micro-batches
    backwards_done: int = 0
    problem: str = ""  # why the open step cannot count this device
    late_steps: int = 0
    gone: str = ""  # why this device is out of the round
    done: bool = False

    @property
    def index(self) -> int:
        return self.route.device_index

    @property
    def present(self) -> bool:
        return self.entry is not None and self.exit is not None and not self.gone

    @property
    def active(self) -> bool:
        return self.present and not self.done


class Host:
    """The joint host of one site in one round. `run` works on the caller's thread; `admit` may come from any."""

    def __init__(
        self,
        plan: pb.Plan,
        stage: Stage,
        optimizer: torch.optim.Optimizer | None,
        hidden_size: int,
        emit: Callable[..., None],
    ) -> None:
        self.plan = plan
        self.stage = stage
        self.optimizer = optimizer
        self.hidden_size = hidden_size
        self.emit = emit
        self.counters = ByteCounters()
        self.inbox = Inbox(plan.deadlines.round_s)
        self.members = {route.device_index: Member(route) for route in plan.routes}
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.totals: list[pb.StepTotal] | None = None
        self.step = 0  # the open one
        self.labels_trained = 0
        self.tokens = 0
        self.compute_seconds = 0.0
        self._door = threading.Lock()
        self._served: deque[int] = deque(self.members)  # whose forward pass is the longest ago comes first
        self._step_opened = time.monotonic()
        self._told_left_out: set[int] = set()  # an event for each change, not for each step of the same
        self._link_owner: dict[int, Member] = {}
        self._backwards: deque[tuple[Member, Frame]] = deque()

    # ---------------------------------------------------------------- the door

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse:
        """The handshake's verdict; attaches to the link before READY leaves."""
        member = self.members.get(hello.device_index)
        if member is None or not hmac.compare_digest(member.route.token, hello.route_token):
            return pb.Refuse(
                reason=f"node {hello.node!r} has no route here in {job_id(self.plan)}, or a wrong route token"
            )
        if hello.model_digest != self.plan.model.digest:
            return pb.Refuse(
                reason=f"node {hello.node!r} has another model ({hello.model_digest[:12]}), the plan's is {self.plan.model.digest[:12]}"
            )
        shared = [name for name in hello.codecs if name in CODECS]
        if not shared:
            return pb.Refuse(reason=f"no codec in common: {list(hello.codecs)} and {list(CODECS)}")
        side = "entry" if hello.link == pb.ENTRY else "exit"
        with self._door:
            if getattr(member, side) is not None or member.gone:
                return pb.Refuse(reason=f"the {side} link of {hello.node!r} was opened before")
            link.name = f"{side} {member.route.device}"
            link.counters = self.counters
            link.max_tensor_bytes = (
                self._unit_rows() * self.plan.task.max_tokens * self.hidden_size * self.stage.dtype.itemsize
            )
            link.silent_s = self.plan.deadlines.silent_s
            link.attach(self.inbox.on_frame, self.inbox.on_lost)
            self._link_owner[id(link)] = member
            setattr(member, side, link)
        return pb.Ready(
            version=PROTOCOL_VERSION, window=self.plan.window, codec=shared[0], job_token=hello.device_index + 1
        )

    # ---------------------------------------------------------------- the round

    def run(self) -> None:
        """Serves the devices until each is done or gone. Raises PeerLost with fewer than `min_devices` of them."""
        self._gather()
        while any(member.active for member in self.members.values()):
            work = self._next_work()
            wait_s = 0.0 if work else self._patience()
            arrival = self.inbox.get(wait_s)
            if arrival is not None:
                self._sort(*arrival)
            elif work is not None:
                began = time.monotonic()
                work()
                self.compute_seconds += time.monotonic() - began
            else:
                self._give_up_on_the_late()
        if not any(member.done for member in self.members.values()):
            raise PeerLost(
                "every device was lost: " + "; ".join(f"{m.route.device}: {m.gone}" for m in self.members.values())
            )

    def close(self, reason: str) -> None:
        """Ends all links; those still open hear why."""
        for member in self.members.values():
            for link in (member.entry, member.exit):
                if link is not None:
                    if not member.done:
                        link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                    link.close()

    def _gather(self) -> None:
        end = time.monotonic() + self.plan.deadlines.ready_s
        while time.monotonic() < end and not all(m.present or m.gone for m in self.members.values()):
            arrival = self.inbox.get(0.05)
            if arrival is not None:
                self._sort(*arrival)
        with self._door:
            for member in self.members.values():
                if not member.present and not member.gone:
                    self._dismiss(member, f"not here after {self.plan.deadlines.ready_s:.0f} s")
        here = sum(member.present for member in self.members.values())
        if here < self.plan.min_devices:
            raise PeerLost(f"{here} of {len(self.members)} devices came; at least {self.plan.min_devices} are needed")

    def _sort(self, link: Link, item: Frame | Lost) -> None:
        """One arrival: control is acted on, tensors are queued as work."""
        member = self._link_owner[id(link)]
        if isinstance(item, Lost):
            if not member.done:
                self._dismiss(member, f"link {link.name}: {item.reason}")
            return
        header = item.header
        try:
            if header.kind == pb.TABLE:
                self._take_table(member, header.table)
            elif header.kind == pb.DONE:
                member.done = not member.gone  # told on both links: the first to be read must not look like a loss
            elif header.kind == pb.CANCEL:
                self._dismiss(member, header.cancel.reason)
            elif header.phase == pb.TRAIN and header.step < self.step:
                pass  # of a step that was closed without this device
            elif header.kind == pb.ACT and link is member.entry:
                self._check_activation(member, item)
                member.forwards.append(item)
            elif header.kind in (pb.GRAD, pb.GRAD_END) and link is member.exit:
                self._backwards.append((member, item))
        except ProtocolError as error:
            self._dismiss(member, f"broke the protocol: {error}")

    # ---------------------------------------------------------------- what to do next

    def _next_work(self) -> Callable[[], None] | None:
        if self._backwards:
            return lambda: self._backward(*self._backwards.popleft())
        if self.totals is None:
            if (
                self.plan.steps
                and all(m.table is not None for m in self.members.values() if m.active)
                and self._active()
            ):
                return self._open_training
        elif self.step < self.plan.steps and not self._pending():
            return self._close_step
        for index in self._served:
            member = self.members[index]
            if member.active and member.forwards and self._may_run(member.forwards[0].header):
                self._served.remove(index)
                self._served.append(index)
                return lambda: self._forward(member, member.forwards.popleft())
        return None

    def _active(self) -> list[Member]:
        return [member for member in self.members.values() if member.active]

    def _may_run(self, header: pb.Header) -> bool:
        # No forward of the next step before this one is applied: it would see old weights.
        return header.phase == pb.EVAL or (self.totals is not None and header.step <= self.step)

    def _expected(self, member: Member) -> int:
        assert member.table is not None
        return len(member.table[self.step].rows)

    def _pending(self) -> list[Member]:
        """Members whose gradients of the open step are still to come."""
        assert self.totals is not None
        counted = self.totals[self.step].members
        return [
            m for m in self._active() if m.index in counted and not m.problem and m.backwards_done < self._expected(m)
        ]

    def _patience(self) -> float:
        if self.totals is None or self.step >= self.plan.steps:
            return self.plan.deadlines.round_s  # evaluation: pulses tell the living from the dead
        return max(0.0, self._step_opened + self.plan.deadlines.step_s - time.monotonic())

    def _give_up_on_the_late(self) -> None:
        for member in self._pending() if self.totals is not None and self.step < self.plan.steps else []:
            member.problem = f"later than {self.plan.deadlines.step_s:.0f} s"
            member.late_steps += 1
            if member.late_steps >= _LATE_STEPS_ALLOWED:
                self._dismiss(member, f"late in {_LATE_STEPS_ALLOWED} steps")

    # ---------------------------------------------------------------- work

    def _forward(self, member: Member, frame: Frame) -> None:
        header = frame.header
        if header.phase == pb.TRAIN and (header.step < self.step or member.problem):
            return  # of a step that was closed, or will be, without this device
        inputs = frame.tensor
        assert inputs is not None
        lengths = list(header.row_lengths)
        if header.phase == pb.EVAL:
            with torch.no_grad():
                output = self.stage(inputs, lengths)
        else:
            inputs.requires_grad_(self._front_trains(member))
            output = self.stage(inputs, lengths)
            member.saved[(header.step, header.micro_batch, header.phase)] = (inputs, output)
        self.tokens += sum(lengths)
        self._send(member.exit, pb.ACT, header, output)

    def _backward(self, member: Member, frame: Frame) -> None:
        header = frame.header
        if member.gone or member.problem or header.step != self.step or self.totals is None:
            return
        saved = member.saved.pop((header.step, header.micro_batch, header.phase), None)
        if saved is None:
            self._dismiss(
                member, f"broke the protocol: gradient of micro-batch {header.micro_batch}, which is not open"
            )
            return
        inputs, output = saved
        wanted = ([inputs] if inputs.requires_grad else []) + self.parameters
        grad_below = None
        if wanted and header.kind == pb.GRAD:
            problem = _gradient_problem(frame.tensor, output)
            if problem:
                member.problem = problem
                return
            found: Gradients = list(torch.autograd.grad(output, wanted, frame.tensor, allow_unused=True))
            if inputs.requires_grad:
                grad_below = found.pop(0)
            self._accumulate(member, found)
        member.backwards_done += 1
        self._send(member.entry, pb.GRAD if grad_below is not None else pb.GRAD_END, header, grad_below)

    def _accumulate(self, member: Member, gradients: Gradients) -> None:
        # One accumulator a device, in micro-batch order: who arrives first must not change the sum.
        if member.gradients is None:
            member.gradients = gradients
            return
        for number, new in enumerate(gradients):
            old = member.gradients[number]
            if new is not None:
                member.gradients[number] = new if old is None else old.add_(new)

    def _open_training(self) -> None:
        """All tables are in: sums the labels of every step and tells everyone."""
        self.totals = []
        for step in range(self.plan.steps):
            rows = {m.index: m.table[step].labels for m in self._active() if m.table is not None}
            members = [index for index, labels in sorted(rows.items()) if labels]
            self.totals.append(pb.StepTotal(labels=sum(rows.values()), members=members))
        for member in self._active():
            assert member.exit is not None
            member.exit.send(pb.Header(kind=pb.TABLE_ALL, phase=pb.TRAIN, table_all=pb.TableAll(steps=self.totals)))
        self._step_opened = time.monotonic()

    def _close_step(self) -> None:
        """Fixes who counts, applies one step on the sum of their gradients, and tells everyone."""
        assert self.totals is not None
        total = self.totals[self.step]
        members = [self.members[index] for index in total.members]
        counted = [m for m in members if m.present and not m.problem and m.backwards_done == self._expected(m)]
        left_out = [m for m in members if m not in counted]
        labels = sum(m.table[self.step].labels for m in counted if m.table is not None)
        if counted and self.optimizer is not None:
            self._apply([m.gradients for m in counted if m.gradients is not None], total.labels, labels)
        self.labels_trained += labels
        close = pb.StepClose(
            counted=[m.index for m in counted],
            labels_counted=labels,
            left_out=[pb.LeftOut(device_index=m.index, reason=m.gone or m.problem) for m in left_out],
        )
        for member in self._active():
            assert member.exit is not None
            member.exit.send(pb.Header(kind=pb.STEP_CLOSE, phase=pb.TRAIN, step=self.step, step_close=close))
        if {m.index for m in left_out} - self._told_left_out:
            self.emit(
                "step_closed", step=self.step, counted=[m.route.device for m in counted],
                left_out=[{"node": m.route.device, "reason": m.gone or m.problem} for m in left_out],
            )  # fmt: skip
        for member in self.members.values():
            member.late_steps = 0 if member in counted else member.late_steps
            member.gradients, member.backwards_done, member.problem = None, 0, ""
            member.saved.clear()
            member.forwards = deque(
                f for f in member.forwards if f.header.phase == pb.EVAL or f.header.step > self.step
            )
        self._told_left_out = {m.index for m in left_out}
        self.step += 1
        self._step_opened = time.monotonic()
        if len(self._active()) < self.plan.min_devices:
            raise RunFailed(f"{len(self._active())} devices are left; at least {self.plan.min_devices} are needed")

    def _apply(self, gradients: list[Gradients], planned_labels: int, counted_labels: int) -> None:
        # Each device divided by the planned union's labels; without some of them, the rest stands for the union.
        factor = planned_labels / counted_labels
        for number, parameter in enumerate(self.parameters):
            parts = [part[number] for part in gradients if part[number] is not None]
            total = parts[0] if parts else None
            for part in parts[1:]:
                total = total + part  # type: ignore[operator]
            parameter.grad = total if total is None or factor == 1.0 else total * factor
        assert self.optimizer is not None
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    # ---------------------------------------------------------------- helpers

    def _unit_rows(self) -> int:
        return -(-self.plan.batch_size // self.plan.micro_batches)

    def _front_trains(self, member: Member) -> bool:
        return self.plan.lora.train_front and member.route.front > 0

    def _send(self, link: Link | None, kind: pb.Kind, of: pb.Header, tensor: torch.Tensor | None) -> None:
        assert link is not None
        header = pb.Header(
            kind=kind, phase=of.phase, step=of.step, micro_batch=of.micro_batch, device_index=of.device_index
        )
        link.progress.phase, link.progress.step = of.phase, of.step
        link.send(header, tensor)

    def _dismiss(self, member: Member, reason: str) -> None:
        """A device is out of the round: its unfinished micro-batches go, its earlier steps stay."""
        if member.gone:
            return
        member.gone = reason
        member.forwards.clear()
        member.saved.clear()
        self.emit("link_lost", link=member.route.device, reason=reason)
        for link in (member.entry, member.exit):
            if link is not None and not link.closed:
                link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                link.close()

    def _take_table(self, member: Member, table: pb.Table) -> None:
        if len(table.steps) != self.plan.steps or member.table is not None:
            raise ProtocolError(f"a TABLE of {len(table.steps)} steps; the plan has {self.plan.steps}, once")
        for row in table.steps:
            if not 1 <= len(row.rows) <= self.plan.micro_batches or sum(row.rows) > self.plan.batch_size:
                raise ProtocolError(f"a TABLE row of {len(row.rows)} micro-batches with {sum(row.rows)} rows")
            if row.labels > self.plan.batch_size * self.plan.task.max_tokens:
                raise ProtocolError(f"a TABLE row of {row.labels} labels, more than the batch has tokens")
        member.table = list(table.steps)

    def _check_activation(self, member: Member, frame: Frame) -> None:
        header, tensor = frame.header, frame.tensor
        if (
            tensor is None
            or tensor.dim() != 3
            or tensor.shape[2] != self.hidden_size
            or tensor.dtype != self.stage.dtype
        ):
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ProtocolError(
                f"hidden states must be {self.stage.dtype} [rows, tokens, {self.hidden_size}], got {got}"
            )
        rows, tokens, _ = tensor.shape
        if not (1 <= rows <= self._unit_rows() and 1 <= tokens <= self.plan.task.max_tokens):
            raise ProtocolError(
                f"hidden states of {rows} rows of {tokens} tokens; the plan allows 1 to {self._unit_rows()} rows of 1 to "
                f"{self.plan.task.max_tokens}"
            )
        if len(header.row_lengths) != rows or not all(1 <= length <= tokens for length in header.row_lengths):
            raise ProtocolError(f"row lengths {list(header.row_lengths)[:8]} do not fit {rows} rows of {tokens} tokens")
        if len(member.forwards) + len(member.saved) >= self.plan.window:
            raise ProtocolError(f"more than {self.plan.window} micro-batches in flight (split.window)")


def _gradient_problem(grad: torch.Tensor | None, output: torch.Tensor) -> str:
    if grad is None or grad.shape != output.shape or grad.dtype != output.dtype:
        return "a gradient of another shape or dtype than the activation"
    if not torch.isfinite(grad).all():
        return "a gradient that is not finite"
    return ""
