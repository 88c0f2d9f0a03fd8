"""Plays a node's part in a job: as a device, as a host, as both at once, or as a host of conversations.

Loads the slices that the plan names, opens the route or lets links in, runs `split.driver` and `split.host`, and fills the
report. Knows links only by `Dial` and `Part.group`, so gRPC between processes and queues inside one process are the same
code. Does not know when parts begin, or that there are others (`node.service`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import EdgelamError, Refused, for_others
from edgelam_fl.files import free_bytes
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.chip import CPU, chip_free_bytes
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.node.answers import measured_answers
from edgelam_fl.node.examples import DeviceExamples, task_of
from edgelam_fl.node.front_cache import FrontCache, NamesFronts
from edgelam_fl.node.held import Held, NodeMemory
from edgelam_fl.node.part import Part
from edgelam_fl.node.server_hub import ServerHub
from edgelam_fl.node.snapshots import Snapshots
from edgelam_fl.serving.sessions import HostSessions
from edgelam_fl.split.driver import Driver
from edgelam_fl.split.ends import Ends
from edgelam_fl.split.group import Group
from edgelam_fl.split.host import AroundPass, Host
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.split.route import Dial, new_route, open_link, open_route, wire_dtype
from edgelam_fl.split.snapshot import ENDS, Damaged, SourceState
from edgelam_fl.split.window import affordable_window
from edgelam_fl.split.workers import workers_of
from edgelam_fl.tasks.metrics import load_metrics
from edgelam_fl.telemetry.events import JobResumed, JobStarted, NodeProgress, TensorsAsked, WindowGranted
from edgelam_fl.telemetry.events.progress import SERVING
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.terms import MakeTerms

_MOST_ASKED = 3  # times for the tensors of one part
LabelsOf = Callable[[str, str], int]  # source, tensor name -> labels that the tensor learned from


@dataclass(frozen=True, kw_only=True)
class NodeHooks:
    """The parts of a node that a simulation or a test replaces; by default, those of a machine of its own."""

    load: Callable[..., list[Stage]] = load_stages
    memory_free: Callable[[torch.device], int] = chip_free_bytes  # bytes on a chip that a host may grant windows from
    workers: Callable[[pb.Plan, int], int] = workers_of
    around_pass: AroundPass = nullcontext  # as of `Host`
    disk_free: Callable[[Path], int] = free_bytes  # bytes that are free on the disk of a folder
    # entered before anything is loaded, left after the contributions are in the report
    around_part: Callable[[pb.Plan], AbstractContextManager[object]] = nullcontext
    # entered with slices and adapter loaded, left after the contributions are in the report
    around_play: Callable[[Part, Held], AbstractContextManager[object]] = lambda part, held: nullcontext()


@dataclass(frozen=True, kw_only=True)
class Means:
    """The means that a node plays all of its parts with."""

    dial: Dial
    hub: ServerHub
    memory: NodeMemory
    examples: DeviceExamples | None  # None: an edge server
    hooks: NodeHooks
    snapshots: Snapshots
    bounds: Bounds  # modules that metrics of the user's own may come from
    kept_fronts: FrontCache  # as a host
    names_fronts: NamesFronts  # as a device


def play(part: Part, request: pb.SubmitRequest, means: Means) -> None:
    """Plays a part and fills its report, except for the state. Raises EdgelamError if the part cannot begin or go on."""
    plan, report = part.plan, part.report
    with means.hooks.around_part(plan):
        began = time.monotonic()
        held = means.memory.hold(plan)
        given = _await_tensors(part, request.adapter, held)
        means.snapshots.begin(plan)
        report.moments = "warm" if held.start(plan, given, request.corrections) else "cold"
        earlier = means.snapshots.resumed(plan, held.sources(plan), request.snapshot) if plan.first_step else {}
        spans = [stage.span for stage in held.stages()]
        started = JobStarted(
            role=pb.Role.Name(plan.role).lower(),
            layers=tuple((span.first, span.last) for span in spans),
            seconds=round(time.monotonic() - began, 3),
        )
        part.emit(started)
        if earlier:
            report.moments = min(state.report.moments for state in earlier.values())  # cold, if one was
            part.emit(JobResumed(steps=plan.first_step, attempt=plan.resume_attempt))
        with means.hooks.around_play(part, held):
            labels_of = Player(part, held, means, earlier).play()
            if plan.steps:
                report.contributions.extend(held.finish(plan, report.labels_trained, labels_of))
                report.update_clipped = held.update_clipped
                means.snapshots.keep_round(plan, held.after_round(plan))
    current = held.current()
    report.adapter_digest = adapters.digest(current) if current is not None else ""


def _await_tensors(part: Part, given: bytes, held: Held) -> bytes:
    """Returns the tensors to start from: those that came with the plan, or if the node lacks others, those that it asked for.

    The node asks more than once, as the answer may be the plan's first message again. Raises PeerLost if nothing comes in time.
    """
    for _ in range(_MOST_ASKED):
        asks = held.asks(part.plan, given)
        if asks is None:
            break
        part.emit(TensorsAsked(held=len(asks)))
        given = part.ask(asks, part.plan.deadlines.ready_s)
    return given


class Player:
    """Plays one part on slices that are loaded, and puts into its report what was measured."""

    def __init__(self, part: Part, held: Held, means: Means, earlier: Mapping[str, SourceState]) -> None:
        """`earlier`: the snapshot of each source that the part goes on from; empty: it begins."""
        self._part, self._plan, self._held, self._means = part, part.plan, held, means
        leave = partial(means.hub.leave, part.plan) if means.hub.keeps(part.plan) else None
        self._earlier, self._keeper = earlier, means.snapshots.keeper(part.plan, part.report.moments, leave)
        self._hub = means.hub.address(part.plan.hub_port)

    def play(self) -> LabelsOf:
        """Plays the part; returns how many labels each tensor of a host learned from."""
        if not self._plan.serves:
            self._drive()
            return _no_labels
        group = self._make_group()
        if self._plan.generate:
            self._speak(group)
            return _no_labels
        host = self._make_host(group)
        self._part.steps_over = lambda: host.steps_over
        self._part.progress = lambda: NodeProgress(doing=SERVING, step=host.steps_over, steps=self._plan.steps)
        self._part.group = group  # from here on HELLO is answered
        if self._plan.routes:
            self._serve_and_drive(host, group)
        else:
            self._serve(host, group)
        return host.labels_of

    # ---------------------------------------------------------------- as a device

    def _drive(self) -> None:
        plan, held = self._plan, self._held
        assert self._means.examples is not None  # a plan with routes of its own is refused otherwise
        task = task_of(plan, held.source.folder)
        loaded = self._means.examples.load(task, plan.task, held.source.digest, self._part.emit)
        counters, route = ByteCounters(), new_route(plan)
        self._part.attach(route.inbox)
        fronts = self._means.names_fronts.of(plan, held.ends[0])
        ends = Ends(
            plan, held.ends, task, held.source.hidden_size, wire_dtype(plan), held.cut_defence(plan), fronts
        )  # fmt: skip
        driver = Driver(plan, ends, held.ends_trainee, route, task, self._part.emit, self._keeper, counters)
        self._part.progress = driver.progress
        if self._earlier:
            with _fitting(plan):
                driver.restore(self._earlier[ENDS])
        try:
            open_route(
                self._means.dial, plan, held.source, route, counters, self._part.emit, driver.timeline.sent, self._hub
            )
            if plan.evaluate and loaded.held_out and not self._earlier:
                driver.evaluate(loaded.held_out)
                if plan.task.metrics:
                    metrics = load_metrics(plan.task.metrics, self._means.bounds)
                    answered = measured_answers(task, loaded.held_out, plan.task, metrics, driver.answers)
                    driver.measured.eval_sums |= answered
            if plan.steps:
                driver.train(loaded.training)
            driver.finish()
        finally:
            for link in (route.entry, route.exit):
                if link is not None:
                    link.close()
        report = self._part.report
        report.examples, report.held_out = len(loaded.training), len(loaded.held_out)
        report.data.CopyFrom(loaded.counts)
        report.MergeFrom(driver.report())
        report.timeline.extend(driver.timeline.report())

    # ---------------------------------------------------------------- as a host

    def _make_group(self) -> Group:
        """Returns the group of the plan's devices, with a window for the memory that is free now."""
        plan, held = self._plan, self._held
        assert held.hosted is not None  # a plan that serves has a hosted span

        def dial_next(
            route: pb.Route, number: int, counters: ByteCounters, make_terms: MakeTerms, inbox: Inbox
        ) -> Link:
            return open_link(
                self._means.dial, plan, held.source, route, number, pb.ENTRY, counters, make_terms, inbox, self._hub
            )

        elements = sum(parameter.numel() for parameter in held.hosted.adapter_parameters.values())
        free = self._means.hooks.memory_free(held.hosted.chip)
        window = affordable_window(plan, held.source, held.hosted.dtype.itemsize, elements, free)
        if window < plan.window:
            self._part.emit(WindowGranted(granted=window, asked=plan.window, memory_free_bytes=free))
        fronts = self._means.kept_fronts.begin(plan)
        group = Group(plan, held.source.hidden_size, wire_dtype(plan), window, dial_next, self._part.emit, fronts)
        self._part.attach(group.inbox, of_host=True)
        return group

    def _make_host(self, group: Group) -> Host:
        plan, held = self._plan, self._held
        assert held.hosted is not None
        task = task_of(plan, held.source.folder) if held.hosted.span.head else None
        trainees = list(held.site_trainees(plan).values())
        hooks = self._means.hooks
        on_cpu = held.hosted.chip == CPU  # an accelerator takes one micro-batch with all of itself
        count = hooks.workers(plan, group.window) if on_cpu else 1
        views = [held.hosted, *(held.hosted.view() for _ in range(count - 1))]
        host = Host(plan, views, group, trainees, task, self._part.emit, self._keeper, hooks.around_pass)
        if self._earlier:
            with _fitting(plan):
                host.restore({source: state for source, state in self._earlier.items() if source != ENDS})
        return host

    def _serve(self, host: Host, group: Group) -> None:
        with _closing(group, "the round is over"):
            host.run()
        _report_host(self._part.report, host, group)

    def _serve_and_drive(self, host: Host, group: Group) -> None:
        """Serves on a thread of its own, so that the host computes for others while the device waits for its own route."""
        failed: list[EdgelamError] = []

        def serve() -> None:
            try:
                self._serve(host, group)
            except EdgelamError as error:
                failed.append(error)
                self._part.cancel(f"the host's part failed: {for_others(error)}")

        beside = threading.Thread(target=serve, name="host", daemon=True)
        beside.start()
        try:
            self._drive()
        except EdgelamError as error:
            self._part.cancel(f"the device's part failed: {for_others(error)}")
            raise
        finally:
            beside.join()
        if failed:
            raise failed[0]

    def _speak(self, group: Group) -> None:
        """Serves conversations, with the adapter of the site, until all devices are done."""
        assert self._held.hosted is not None
        self._held.site_trainees(self._plan)[self._plan.site].use()
        self._part.group = group
        with _closing(group, "the conversation is over"):
            HostSessions(self._plan, self._held.hosted, group).run()


@contextmanager
def _fitting(plan: pb.Plan) -> Iterator[None]:
    """Raises Refused if what the block goes on from is not what the plan needs, or was never whole."""
    try:
        yield
    except (Damaged, KeyError, TypeError, ValueError) as error:
        raise Refused(
            f"node {plan.node} cannot go on after step {plan.first_step}: its snapshot does not fit"
        ) from error


@contextmanager
def _closing(group: Group, reason: str) -> Iterator[None]:
    """Closes the group's links after the block, and gives the devices the reason, or the block's error instead."""
    try:
        yield
    except EdgelamError as error:
        reason = for_others(error)
        raise
    finally:
        group.close(reason)


def _no_labels(source: str, tensor: str) -> int:
    return 0


def _report_host(report: pb.JobReport, host: Host, group: Group) -> None:
    span = host.span
    gradients, clipped = host.clipped()
    hosted = pb.HostPart(
        first_layer=span.first, last_layer=span.last, compute_seconds=host.compute_seconds,
        bytes=group.counters.report(), labels_trained=host.labels_trained,
        left_out=host.left_out(), gradients=gradients, gradients_clipped=clipped,
    )  # fmt: skip
    report.host.CopyFrom(hosted)
    report.timeline.extend(host.timeline.report())
