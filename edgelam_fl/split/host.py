"""A host's part in one round: forward and backward for several devices, and one joint optimizer step.

Hosts stand in a chain; a device reaches the first by its entry link and the last by its exit link. The last one
coordinates: it counts labels, closes steps, and what it decides goes up the chain along every route's links.

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

import torch

from edgelam_fl.errors import EdgelamError, PeerLost, ProtocolError, RunFailed
from edgelam_fl.model.stage import Stage
from edgelam_fl.split.job import Inbox, Lost, job_id
from edgelam_fl.split.member import Gradients, Member, check_activation, checked_table, gradient_problem, unit_rows
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Ears, Frame, Link

_LATE_STEPS_ALLOWED = 3
_RETRY_MS = 200

_GO_UP = (pb.TABLE, pb.TABLE_ALL, pb.STEP_CLOSE)

# route, hop number, counters, ears -> an open entry link to that hop
DialNext = Callable[[pb.Route, int, ByteCounters, Ears], Link]


class Host:
    """The joint host of one site in one round. `run` works on the caller's thread; `admit` may come from any."""

    def __init__(
        self,
        plan: pb.Plan,
        stage: Stage,
        optimizer: torch.optim.Optimizer | None,
        hidden_size: int,
        dial: DialNext,
        emit: Callable[..., None],
    ) -> None:
        self.plan = plan
        self.stage = stage
        self.optimizer = optimizer
        self.hidden_size = hidden_size
        self.emit = emit
        self.counters = ByteCounters()
        self._dial = dial
        hops = [hop.node for hop in plan.routes[0].hops]
        self._position = hops.index(plan.node)
        self._coordinates = self._position == len(hops) - 1
        self.inbox = Inbox(plan.deadlines.round_s)
        self.members = {route.device_index: Member(route) for route in plan.routes}
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.totals: list[pb.StepTotal] | None = None
        self.step = 0  # the open one
        self.labels_trained = 0
        self.compute_seconds = 0.0
        self._door = threading.Lock()
        self._served: deque[int] = deque(self.members)  # whose forward pass is the longest ago comes first
        self._step_opened = time.monotonic()
        self._closes: dict[int, pb.StepClose] = {}  # told by the coordinator, not yet applied here
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
        entry = hello.link == pb.ENTRY
        if not entry and not self._coordinates:
            return pb.Refuse(reason=f"node {hello.node!r} dials its exit here, and this is not its route's last host")
        side = "entry" if entry else "exit"
        with self._door:
            if (member.upstream if entry else member.downstream) is not None or member.gone:
                return pb.Refuse(reason=f"the {side} link of {hello.node!r} was opened before")
            link.name = f"{side} {member.route.device}"
            link.counters = self.counters
            link.max_tensor_bytes = (
                unit_rows(self.plan) * self.plan.task.max_tokens * self.hidden_size * self.stage.dtype.itemsize
            )
            link.silent_s = self.plan.deadlines.silent_s
            link.attach(self.inbox.on_frame, self.inbox.on_lost)
            self._link_owner[id(link)] = member
            if entry:
                member.upstream = link
            else:
                member.downstream = link
        return pb.Ready(
            version=PROTOCOL_VERSION, window=self.plan.window, codec=shared[0], job_token=hello.device_index + 1
        )

    # ---------------------------------------------------------------- the round

    def run(self) -> None:
        """Serves the devices until each is done or gone. Raises PeerLost with fewer than `min_devices` of them."""
        if not self._coordinates:
            self._dial_downstream()
        self._gather()
        while self._active() or self._steps_to_come():
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
            for link in (member.upstream, member.downstream):
                if link is not None:
                    if not member.done:
                        link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                    link.close()

    def _dial_downstream(self) -> None:
        for member in self.members.values():
            try:
                link = self._dial(
                    member.route, self._position + 1, self.counters, (self.inbox.on_frame, self.inbox.on_lost)
                )
            except EdgelamError as error:
                self._dismiss(member, str(error))
                continue
            with self._door:
                self._link_owner[id(link)] = member
                member.downstream = link

    def _steps_to_come(self) -> bool:
        """Whether devices are through whose last steps are not applied here yet: their closes are still on their way."""
        waiting = not self._coordinates and self.totals is not None and self.step < self.plan.steps
        return waiting and any(member.present for member in self.members.values())

    def _closes_to_come(self) -> bool:
        steps = range(self.step, self.plan.steps) if self._steps_to_come() else []
        return any(step not in self._closes for step in steps)

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
            if not member.done or (link is member.downstream and self._closes_to_come()):
                self._lose(member, link, f"link {link.name}: {item.reason}")
            return
        header = item.header
        try:
            if (
                link is member.downstream
                and header.kind in _GO_UP
                and not (self._coordinates and header.kind != pb.TABLE)
            ):
                self._take_decision(member, header)
            elif header.kind == pb.DONE:
                member.done = not member.gone  # told on both links: the first to be read must not look like a loss
                self._relay_done(member, link, header)
            elif header.kind == pb.CANCEL:
                self._lose(member, member.upstream, header.cancel.reason)
            elif header.phase == pb.TRAIN and header.step < self.step:
                pass  # of a step that was closed without this device
            elif header.kind == pb.ACT and link is member.upstream:
                check_activation(item, member, self.plan, self.hidden_size, self.stage.dtype)
                member.forwards.append(item)
            elif header.kind in (pb.GRAD, pb.GRAD_END) and link is member.downstream:
                self._backwards.append((member, item))
        except ProtocolError as error:
            self._lose(member, link, f"broke the protocol: {error}")

    # ---------------------------------------------------------------- what to do next

    def _next_work(self) -> Callable[[], None] | None:
        if self._backwards:
            return lambda: self._backward(*self._backwards.popleft())
        if self.totals is None:
            if self._coordinates and self.plan.steps and self._active() and all(m.table for m in self._active()):
                return self._open_training
        elif self.step < self.plan.steps and self._may_close() and not self._pending():
            return self._close_step
        for index in self._served:
            member = self.members[index]
            if member.active and member.forwards and self._may_run(member.forwards[0].header):
                self._served.remove(index)
                self._served.append(index)
                return lambda: self._forward(member, member.forwards.popleft())
        return None

    def _may_close(self) -> bool:
        return self._coordinates or self.step in self._closes

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
        counted = self._closes[self.step].counted if self.step in self._closes else self.totals[self.step].members
        present = [m for m in self.members.values() if m.present]
        return [m for m in present if m.index in counted and not m.problem and m.backwards_done < self._expected(m)]

    def _patience(self) -> float:
        if self.totals is None or self.step >= self.plan.steps or not self._coordinates:
            return self.plan.deadlines.round_s  # evaluation: pulses tell the living from the dead
        return max(0.0, self._step_opened + self.plan.deadlines.step_s - time.monotonic())

    def _give_up_on_the_late(self) -> None:
        for member in self._pending() if self._coordinates and self.totals and self.step < self.plan.steps else []:
            member.problem = f"later than {self.plan.deadlines.step_s:.0f} s"
            member.late_steps += 1
            if member.late_steps >= _LATE_STEPS_ALLOWED:
                self._dismiss(member, f"late in {_LATE_STEPS_ALLOWED} steps")

    # ---------------------------------------------------------------- work

    def _forward(self, member: Member, frame: Frame) -> None:
        header = frame.header
        if member.leaving or (header.phase == pb.TRAIN and (header.step < self.step or member.problem)):
            return  # of a step that was closed, or will be, without this device
        inputs = frame.tensor
        assert inputs is not None
        lengths = list(header.row_lengths)
        if header.phase == pb.EVAL:
            with torch.no_grad():
                output = self.stage(inputs, lengths)
        else:
            inputs.requires_grad_(self._trains_below(member))
            output = self.stage(inputs, lengths)
            member.saved[(header.step, header.micro_batch, header.phase)] = (inputs, output)
        self._send(member.downstream, pb.ACT, header, output)

    def _backward(self, member: Member, frame: Frame) -> None:
        header = frame.header
        out = member.gone and self._coordinates  # up the chain, what the coordinator has counted is still needed
        if out or member.problem or header.step != self.step or self.totals is None:
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
            problem = gradient_problem(frame.tensor, output)
            if problem and self._coordinates:
                member.problem = problem
                return
            if problem:  # it was finite at the coordinator, which counts it: here nothing of it can be used
                self._dismiss(member, problem)
                return
            found: Gradients = list(torch.autograd.grad(output, wanted, frame.tensor, allow_unused=True))
            if inputs.requires_grad:
                grad_below = found.pop(0)
            self._accumulate(member, found)
        member.backwards_done += 1
        self._send(member.upstream, pb.GRAD if grad_below is not None else pb.GRAD_END, header, grad_below)

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
        self._decide(pb.Header(kind=pb.TABLE_ALL, phase=pb.TRAIN, table_all=pb.TableAll(steps=self.totals)))
        self._step_opened = time.monotonic()

    def _close_step(self) -> None:
        """Applies one step on the sum of the counted members' gradients; the coordinator fixes and tells who counts."""
        assert self.totals is not None
        total = self.totals[self.step]
        members = [self.members[index] for index in total.members]
        ready = [m for m in members if not m.problem and m.table and m.backwards_done == self._expected(m)]
        if self._coordinates:
            counted = [m for m in ready if m.present]
        else:
            told = self._closes.pop(self.step).counted
            counted = [m for m in ready if m.index in told]
        left_out = [m for m in members if m not in counted]
        labels = sum(m.table[self.step].labels for m in counted if m.table is not None)
        if counted and self.optimizer is not None:
            self._apply([m.gradients for m in counted if m.gradients is not None], total.labels, labels)
        self.labels_trained += labels
        if self._coordinates:
            close = pb.StepClose(
                counted=[m.index for m in counted],
                labels_counted=labels,
                left_out=[pb.LeftOut(device_index=m.index, reason=m.gone or m.problem) for m in left_out],
            )
            self._decide(pb.Header(kind=pb.STEP_CLOSE, phase=pb.TRAIN, step=self.step, step_close=close))
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
        if self._coordinates and len(self._active()) < self.plan.min_devices:
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

    def _trains_below(self, member: Member) -> bool:
        """Whether anything before this stage learns, so that a gradient has to go on."""
        lora = self.plan.lora
        return (lora.train_front and member.route.front > 0) or (lora.train_hosts and self._position > 0)

    def _relay_done(self, member: Member, link: Link, header: pb.Header) -> None:
        """On to the other hosts of the route, before this one closes: they must not take its end for a loss."""
        if link is member.upstream and not self._coordinates:
            self._relay(member.downstream, header)
        elif link is member.downstream and self._position > 0:
            self._relay(member.upstream, header)

    def _decide(self, header: pb.Header) -> None:
        """The coordinator's word, to every device and up every chain."""
        for member in self._active():
            self._relay(member.downstream, header)
            self._relay(member.upstream if self._position > 0 else None, header)

    def _relay(self, link: Link | None, header: pb.Header) -> None:
        if link is not None:
            copy = pb.Header()
            copy.CopyFrom(header)  # a link writes its own numbers into what it sends
            link.send(copy)

    def _take_decision(self, member: Member, header: pb.Header) -> None:
        """TABLE from the device, or the coordinator's word, on the way up; the first copy of a word is acted on."""
        if header.kind == pb.TABLE:
            member.table = checked_table(header.table, member, self.plan)
        elif header.kind == pb.TABLE_ALL and self.totals is None:
            if len(header.table_all.steps) != self.plan.steps:
                raise ProtocolError(
                    f"a TABLE_ALL of {len(header.table_all.steps)} steps; the plan has {self.plan.steps}"
                )
            self.totals = list(header.table_all.steps)
        elif header.kind == pb.STEP_CLOSE and header.step >= self.step:
            self._closes.setdefault(header.step, header.step_close)
        self._relay(member.upstream if self._position > 0 else None, header)

    def _send(self, link: Link | None, kind: pb.Kind, of: pb.Header, tensor: torch.Tensor | None) -> None:
        assert link is not None
        header = pb.Header(
            kind=kind, phase=of.phase, step=of.step, micro_batch=of.micro_batch, device_index=of.device_index,
            row_lengths=of.row_lengths,
        )  # fmt: skip
        link.progress.phase, link.progress.step = of.phase, of.step
        link.send(header, tensor)

    def _lose(self, member: Member, link: Link | None, reason: str) -> None:
        """A link failed. The coordinator lets the device go; the others stop its forward passes, pass that on, and wait:
        gradients of a step that the coordinator has closed with it are still on their way up."""
        if self._coordinates or link is member.downstream:
            self._dismiss(member, reason)
        elif not member.leaving and not member.gone:
            self._note_loss(member, reason)
            cancel = pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason))
            self._relay(member.upstream, cancel)
            self._relay(member.downstream, cancel)
            if member.upstream is not None:
                member.upstream.close()

    def _note_loss(self, member: Member, reason: str) -> None:
        if not member.leaving:
            member.leaving = reason
            member.forwards.clear()
            self.emit("link_lost", link=member.route.device, reason=reason)

    def _dismiss(self, member: Member, reason: str) -> None:
        """A device is out of the round: its unfinished micro-batches go, its earlier steps stay."""
        if member.gone:
            return
        self._note_loss(member, reason)
        member.gone = member.leaving
        for link in (member.upstream, member.downstream):
            if link is not None and not link.closed:
                link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                link.close()
