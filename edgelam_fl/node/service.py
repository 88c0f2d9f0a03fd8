"""A stage host: what a node keeps between rounds, and its part in each of them.

It holds the frozen slice, the adapter and the optimizer's moments; runs one job at a time on a thread of its own; and is
told what to do by plans, not by messages. Knows links only through `Dial` and `admit`, so that gRPC between processes
and queues inside one are the same code.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from edgelam_fl.addresses import join_address
from edgelam_fl.errors import DataError, EdgelamError, Refused
from edgelam_fl.hub.fetch import open_model
from edgelam_fl.machine import memory_free_bytes, peak_rss_bytes
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.bases import usable_bases
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.speed import measure_bases
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.node.examples import task_of
from edgelam_fl.node.held import Held, slice_key
from edgelam_fl.node.profile.answer import add_measured
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.reading import hosted_span, job_id, part_id
from edgelam_fl.serving.sessions import HostSessions
from edgelam_fl.split.driver import Driver
from edgelam_fl.split.ends import Ends
from edgelam_fl.split.group import Group
from edgelam_fl.split.host import Host
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.split.route import Dial, new_route, open_link, open_route, wire_dtype
from edgelam_fl.split.window import affordable_window
from edgelam_fl.tasks.base import Example, Task
from edgelam_fl.tasks.data import Pair, device_pairs
from edgelam_fl.telemetry.events import Emit, EmitInJob, JobDone, JobEvent, JobStarted, WindowGranted
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.relay import Relay
from edgelam_fl.wire.terms import MakeTerms

_RETRY_MS = 200
_RESULTS_KEPT = 2
_GONE_S = 2.0
VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio", "numpy")


class Closes(Protocol):
    def close(self) -> object: ...


# the relay, the doorkeeper -> open until it is closed
OpenDoor = Callable[[Relay, Callable[[pb.Hello, Link], pb.Ready | pb.NotReady | pb.Refuse]], Closes]


@dataclass
class Part:
    """A job here: running, then its report."""

    plan: pb.Plan
    report: pb.JobReport
    finished: threading.Event
    _inboxes: list[Inbox] = field(default_factory=list)  # of the device's part and of the host's
    _cancelled: str = ""

    def cancel(self, reason: str) -> None:
        """Also before there is an inbox: loading a slice takes its time."""
        self._cancelled = reason
        for inbox in self._inboxes:
            inbox.cancel(reason)

    def attach(self, inbox: Inbox) -> None:
        self._inboxes.append(inbox)
        if self._cancelled:
            inbox.cancel(self._cancelled)


class StageHost:
    def __init__(
        self,
        name: str,
        dial: Dial,
        emit: Emit,
        *,
        data: Path | None = None,
        address: str = "",
        tags: Sequence[str] = (),
        server: str = "",
        read: Callable[[Path, Any], tuple[list[Pair], list[Pair]]] = device_pairs,
        load: Callable[..., list[Stage]] = load_stages,
        open_door: OpenDoor | None = None,
    ) -> None:
        """`data`: a device's examples (None: an edge server). `address`: where others reach this node's data plane.
        `tags`: words by which a run may choose it. `server`: the host on which the server's hub is. `read`: (training,
        held-out) pairs out of the data. `load`: slices. `open_door`: how others may reach it through the server's hub.
        """
        self.name = name
        self.role = pb.DEVICE if data else pb.EDGE
        self._dial = dial
        self._emit = emit
        self._data = data
        self._address = address
        self._tags = tuple(tags)
        self._server = server
        self._read, self._load, self._open_door = read, load, open_door
        self._lock = threading.Lock()
        self._parts: dict[str, Part] = {}
        self._current: Part | None = None
        self._worker: threading.Thread | None = None
        self._held: Held | None = None
        self._hosting: Group | None = None
        self._examples: tuple[bytes, tuple[list[Example], list[Example]]] | None = None

    # ---------------------------------------------------------------- control, any thread

    def profile(self, request: pb.ProfileRequest) -> pb.Profile:
        profile = pb.Profile(
            protocol_version=PROTOCOL_VERSION,
            name=self.name,
            role=self.role,
            address=self._address,
            tags=self._tags,
            memory_available_bytes=memory_free_bytes(),
            cpu_threads=torch.get_num_threads(),
            bases=usable_bases(),
            codecs=list(CODECS),
            versions={package: importlib.metadata.version(package) for package in VERSIONED},
        )
        if request.protocol_version != PROTOCOL_VERSION:
            profile.problem = f"speaks protocol version {PROTOCOL_VERSION}, the server {request.protocol_version}"
        elif self._data is not None:
            try:
                training, held_out = self._read(self._data, request.task)
                profile.examples, profile.held_out = len(training), len(held_out)
            except DataError as error:
                profile.problem = str(error)
        if request.measure_model and not profile.problem:
            profile.base_seconds.update(
                measure_bases(self._find(request.measure_model, request.model_digest, request.hub_port))
            )
        if not profile.problem:
            add_measured(profile, request, self._find, self._server)
        return profile

    def _find(self, name: str, digest: str, hub_port: int, tokenizer: bool = False) -> ModelSource:
        """The model, from this machine or the server's hub."""
        return open_model(name, digest, self._hub(hub_port), tokenizer=tokenizer, emit=self._emit)

    def _hub(self, port: int) -> str:
        """Its HOST:PORT; empty: there is none."""
        return join_address(self._server, port) if self._server and port else ""

    def _find_planned(self, plan: pb.Plan) -> ModelSource:
        hosted = hosted_span(plan)
        reads_text = bool(plan.routes) or (hosted is not None and hosted.head)
        return self._find(plan.model.name, plan.model.digest, plan.hub_port, reads_text)

    def submit(self, request: pb.SubmitRequest) -> pb.SubmitReply:
        """Starts a part; the same part again attaches to it. A newer attempt cancels what runs."""
        plan = request.plan
        refusal = self._refusal(plan)
        if refusal:
            return pb.SubmitReply(accepted=False, reason=refusal)
        with self._lock:
            if part_id(plan) in self._parts:
                return pb.SubmitReply(accepted=True)
            previous, previous_worker = self._current, self._worker
            part = Part(
                plan,
                pb.JobReport(job=part_id(plan), node=self.name, role=self.role, state="running"),
                threading.Event(),
            )
            self._parts[part_id(plan)] = self._current = part
            while len(self._parts) > _RESULTS_KEPT:
                self._parts.pop(next(iter(self._parts)))
            if previous is not None:
                previous.cancel(f"{part_id(plan)} takes its place")
            self._worker = threading.Thread(
                target=self._work, args=(part, request, previous_worker), name="compute", daemon=True
            )
            self._worker.start()
        return pb.SubmitReply(accepted=True)

    def wait(self, request: pb.WaitRequest) -> pb.JobReport:
        """The part's report; state "running" when it has none after `timeout_s`."""
        with self._lock:
            part = self._parts.get(request.job)
        if part is None:
            return pb.JobReport(
                job=request.job, node=self.name, state="failed", error=f"node {self.name} knows no job {request.job}"
            )
        part.finished.wait(request.timeout_s)
        return part.report

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse:
        """The data plane's doorkeeper."""
        group = self._hosting
        if group is None or job_id(group.plan) != hello.job:
            part = self._parts.get(f"{hello.job}/{self.name}")  # `part_id`
            if part is not None and part.report.state == "failed":
                return pb.Refuse(
                    reason=f"node {self.name} has given up its part of {hello.job}; the server was told why"
                )
            return pb.NotReady(retry_ms=_RETRY_MS)
        return group.admit(hello, link)

    def stop(self) -> None:
        with self._lock:
            part, worker = self._current, self._worker
        if part is not None:
            part.cancel(f"node {self.name} is shutting down")
        if worker is not None:
            worker.join(timeout=5)

    def _refusal(self, plan: pb.Plan) -> str:
        if plan.protocol_version != PROTOCOL_VERSION:
            return f"a plan of protocol version {plan.protocol_version}; node {self.name} speaks {PROTOCOL_VERSION}"
        if plan.node != self.name or plan.role != self.role:
            return (
                f"a plan for {pb.Role.Name(plan.role)} {plan.node!r}; this is {pb.Role.Name(self.role)} {self.name!r}"
            )
        if plan.model.base not in usable_bases():
            usable = ", ".join(usable_bases())
            return f"base {plan.model.base!r}; node {self.name} has {usable} (`edgelam doctor` there says why)"
        routes = plan.routes or plan.serves
        if not (routes and plan.batch_size and plan.micro_batches and plan.window and plan.deadlines.round_s > 0):
            return "a plan without route, batch size, micro-batches, window or deadlines"
        if len(plan.routes) != (self._data is not None and not plan.generate):
            return f"a plan with {len(plan.routes)} routes of its own for {pb.Role.Name(self.role)} {self.name!r}"
        if len(plan.optimizer.lrs) != plan.steps:
            return f"a plan of {plan.steps} steps with {len(plan.optimizer.lrs)} learning rates"
        try:
            host_mode(plan.host_mode), label_place(plan.labels)
        except Refused as error:
            return str(error)
        return ""

    # ---------------------------------------------------------------- the compute thread

    def _work(self, part: Part, request: pb.SubmitRequest, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        report = part.report

        def emit(event: JobEvent) -> None:
            self._emit(replace(event, job=report.job))

        try:
            with self._door(part.plan):
                self._run_part(part, request, emit)
            report.state = "done"
        except EdgelamError as error:
            report.state, report.error = "failed", str(error)
        except Exception as error:  # a bug must reach the server as a message, not as silence
            report.state, report.error = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            report.peak_rss_bytes = peak_rss_bytes()
            self._hosting = None
            emit(JobDone(state=report.state, error=report.error))
            part.finished.set()

    def _door(self, plan: pb.Plan) -> AbstractContextManager[object]:
        """Open while a host has its part: those who cannot reach it here come by the hub."""
        hub = self._hub(plan.hub_port)
        if self._open_door is None or not (hub and plan.relay_token):
            return nullcontext()
        return closing(self._open_door(Relay(hub, part_id(plan), plan.relay_token), self.admit))

    def _run_part(self, part: Part, request: pb.SubmitRequest, emit: EmitInJob) -> None:
        plan, report, began = part.plan, part.report, time.monotonic()
        held = self._hold(plan)
        report.moments = "warm" if held.start(plan, request.adapter, request.corrections) else "cold"
        started = JobStarted(
            role=pb.Role.Name(plan.role).lower(),
            layers=tuple((stage.span.first, stage.span.last) for stage in held.stages()),
            seconds=round(time.monotonic() - began, 3),
        )
        emit(started)
        site_labels = self._play(part, held, emit) or (lambda source, name: 0)
        report.contributions.extend(held.finish(plan, report.labels_trained, site_labels) if plan.steps else [])
        current = held.current()
        report.adapter_digest = adapters.digest(current) if current is not None else ""

    def _hold(self, plan: pb.Plan) -> Held:
        if self._held is not None and self._held.key == slice_key(plan):
            return self._held
        before, old = {}, list[weakref.ref[Stage]]()
        if self._held is not None:
            before, old = self._held.known(), [weakref.ref(stage) for stage in self._held.stages()]
        self._held = None  # the old slice goes before the new one comes: there is memory for one
        _await_gone(old)
        self._held = Held(plan, self._load, self._find_planned, before)
        return self._held

    def _play(self, part: Part, held: Held, emit: EmitInJob) -> Callable[[str, str], int] | None:
        """The node's part as a host, as a device, or as both at once. Returns what hosted tensors learned from, in labels."""
        if not part.plan.serves:
            self._drive(part, held, emit)
            return None
        if part.plan.generate:
            self._generate(part, held, emit)
            return None
        host, group = self._make_host(part, held, emit)
        if not part.plan.routes:
            self._serve(part, host, group)
        else:
            self._host_and_drive(part, held, host, group, emit)
        return host.labels_of

    def _host_and_drive(self, part: Part, held: Held, host: Host, group: Group, emit: EmitInJob) -> None:
        """The host on a thread of its own, so that it computes for others while the device waits for its own route."""
        failed: list[EdgelamError] = []

        def serve() -> None:
            try:
                self._serve(part, host, group)
            except EdgelamError as error:
                failed.append(error)
                part.cancel(f"the host's part failed: {error}")

        beside = threading.Thread(target=serve, name="host", daemon=True)
        beside.start()
        try:
            self._drive(part, held, emit)
        except EdgelamError as error:
            part.cancel(f"the device's part failed: {error}")
            raise
        finally:
            beside.join()
        if failed:
            raise failed[0]

    # ---------------------------------------------------------------- as a device

    def _drive(self, part: Part, held: Held, emit: EmitInJob) -> None:
        plan, report = part.plan, part.report
        task = task_of(plan, held.source.folder)
        training, held_out = self._load_examples(plan, task)
        counters, route = ByteCounters(), new_route(plan)
        part.attach(route.inbox)
        ends = Ends(plan, held.ends, task, wire_dtype(plan))
        driver = Driver(plan, ends, held.ends_trainee, route, task, emit)
        try:
            hub = self._hub(plan.hub_port)
            open_route(self._dial, plan, held.source, route, counters, driver.timeline.sent, hub)
            if plan.evaluate:
                driver.evaluate(held_out)
            if plan.steps:
                driver.train(training)
            driver.finish()
        finally:
            for link in (route.entry, route.exit):
                if link is not None:
                    link.close()
        measured = driver.measured
        report.eval_loss_sum, report.eval_labels = measured.eval_loss_sum, measured.eval_labels
        report.eval_sums.update(measured.eval_sums)
        report.eval_seconds, report.train_seconds = measured.eval_seconds, measured.train_seconds
        report.compute_seconds, report.tokens_trained = measured.compute_seconds, measured.tokens_trained
        report.labels_trained, report.examples = measured.labels_trained, len(training)
        report.steps.extend(measured.steps)
        report.bytes.extend(counters.report())
        report.timeline.extend(driver.timeline.report())

    def _load_examples(self, plan: pb.Plan, task: Task) -> tuple[list[Example], list[Example]]:
        """(training, held-out), tokenized once for the same file and settings."""
        assert self._data is not None
        settings = plan.task
        key = settings.SerializeToString(deterministic=True) + str(os.stat(self._data).st_mtime_ns).encode()
        if self._examples is None or self._examples[0] != key:
            training, held_out = self._read(self._data, settings)
            self._examples = key, (task.examples(training), task.examples(held_out))
        return self._examples[1]

    # ---------------------------------------------------------------- as a host

    def _make_host(self, part: Part, held: Held, emit: EmitInJob) -> tuple[Host, Group]:
        assert held.hosted is not None
        group = self._make_group(part, held, emit)
        task = task_of(part.plan, held.source.folder) if held.hosted.span.head else None
        host = Host(part.plan, held.hosted, group, list(held.site_trainees(part.plan).values()), task, emit)
        self._hosting = group  # from here on HELLO is answered
        return host, group

    def _make_group(self, part: Part, held: Held, emit: EmitInJob) -> Group:
        plan = part.plan

        def dial_next(route: pb.Route, number: int, counters: ByteCounters, make_terms: MakeTerms) -> Link:
            hub = self._hub(plan.hub_port)
            return open_link(self._dial, plan, held.source, route, number, pb.ENTRY, counters, make_terms, hub)

        assert held.hosted is not None
        size = sum(parameter.numel() for parameter in held.hosted.adapter_parameters.values())
        window = affordable_window(plan, held.source, held.hosted.dtype.itemsize, size, memory_free_bytes())
        if window < plan.window:
            emit(WindowGranted(granted=window, asked=plan.window, memory_free_bytes=memory_free_bytes()))
        group = Group(plan, held.source.hidden_size, wire_dtype(plan), window, dial_next, emit)
        part.attach(group.inbox)
        return group

    def _generate(self, part: Part, held: Held, emit: EmitInJob) -> None:
        assert held.hosted is not None
        held.site_trainees(part.plan)[part.plan.site].use()
        group = self._make_group(part, held, emit)
        self._hosting = group
        reason = "the conversation is over"
        try:
            HostSessions(part.plan, held.hosted, group).run()
        except EdgelamError as error:
            reason = str(error)
            raise
        finally:
            group.close(reason)

    def _serve(self, part: Part, host: Host, group: Group) -> None:
        reason = "the round is over"
        try:
            host.run()
        except EdgelamError as error:
            reason = str(error)
            raise
        finally:
            group.close(reason)
        report, span = part.report, host.stage.span
        report.host.CopyFrom(
            pb.HostPart(
                first_layer=span.first, last_layer=span.last, compute_seconds=host.compute_seconds,
                bytes=group.counters.report(), labels_trained=host.labels_trained,
            )
        )  # fmt: skip
        report.timeline.extend(host.timeline.report())


def _await_gone(stages: Sequence[weakref.ref[Stage]]) -> None:
    """Modules know each other in rings. While another thread collects, a collection here does nothing, so it is repeated."""
    end = time.monotonic() + _GONE_S
    while any(stage() is not None for stage in stages):
        gc.collect()
        if time.monotonic() > end:
            return
        time.sleep(0.01)
