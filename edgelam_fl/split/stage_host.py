"""A stage host: what a node keeps between rounds, and its part in each of them.

It holds the frozen slice, the adapter and the optimizer's moments; runs one job at a time on a thread of its own; and is
told what to do by plans, not by messages. Knows links only through `Dial` and `admit`, so that gRPC between processes
and queues inside one are the same code.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from edgelam_fl.errors import DataError, EdgelamError, PeerLost, Refused
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import Stage, load_stages
from edgelam_fl.model.weights import BASES
from edgelam_fl.split.driver import Driver, Route
from edgelam_fl.split.host import Host
from edgelam_fl.split.job import Inbox, job_id, lora_of, make_optimizer, part_id, peak_rss_bytes, spans_of
from edgelam_fl.tasks.base import Example
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import device_pairs
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Ears, Link

_RETRY_MS = 200
_RESULTS_KEPT = 2
VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio", "numpy")

# address, link name, hello, counters, ears, deadlines -> an open link and READY
Dial = Callable[[str, str, pb.Hello, ByteCounters, Ears, pb.Deadlines], tuple[Link, pb.Ready]]


@dataclass
class Held:
    """The slice in memory, and the state that the next round may continue from."""

    key: tuple[Any, ...]  # what would make it another slice
    source: ModelSource
    stages: list[Stage]
    optimizer: torch.optim.Optimizer | None = None
    moments_key: tuple[Any, ...] = ()  # adapter digest, freeze flags and rank that the moments belong to

    def adapter(self) -> adapters.Adapter:
        return {name: array for stage in self.stages for name, array in stage.adapter().items()}


@dataclass
class Part:
    """A job here: running, then its report."""

    plan: pb.Plan
    report: pb.JobReport
    finished: threading.Event
    _inbox: Inbox | None = None
    _cancelled: str = ""

    def cancel(self, reason: str) -> None:
        """Also before there is an inbox: loading a slice takes its time."""
        self._cancelled = reason
        if self._inbox is not None:
            self._inbox.cancel(reason)

    def attach(self, inbox: Inbox) -> None:
        self._inbox = inbox
        if self._cancelled:
            inbox.cancel(self._cancelled)


class StageHost:
    def __init__(
        self,
        name: str,
        dial: Dial,
        emit: Callable[..., None],
        *,
        data: Path | None = None,
        address: str = "",
    ) -> None:
        """`data`: a device's examples (None: an edge server). `address`: where others reach this node's data plane."""
        self.name = name
        self.role = pb.DEVICE if data else pb.EDGE
        self._dial = dial
        self._emit = emit
        self._data = data
        self._address = address
        self._lock = threading.Lock()
        self._parts: dict[str, Part] = {}
        self._current: Part | None = None
        self._worker: threading.Thread | None = None
        self._held: Held | None = None
        self._hosting: Host | None = None
        self._examples: tuple[bytes, tuple[list[Example], list[Example]]] | None = None

    # ---------------------------------------------------------------- control, any thread

    def profile(self, request: pb.ProfileRequest) -> pb.Profile:
        profile = pb.Profile(
            protocol_version=PROTOCOL_VERSION,
            name=self.name,
            role=self.role,
            address=self._address,
            memory_available_bytes=psutil.virtual_memory().available,
            cpu_threads=torch.get_num_threads(),
            bases=BASES,
            codecs=list(CODECS),
            versions={package: importlib.metadata.version(package) for package in VERSIONED},
        )
        if request.protocol_version != PROTOCOL_VERSION:
            profile.problem = f"speaks protocol version {PROTOCOL_VERSION}, the server {request.protocol_version}"
        elif self._data is not None:
            try:
                training, held_out = device_pairs(self._data, request.task)
                profile.examples, profile.held_out = len(training), len(held_out)
            except DataError as error:
                profile.problem = str(error)
        return profile

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
                target=self._work, args=(part, request.adapter, previous_worker), name="compute", daemon=True
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
        host = self._hosting
        if host is None or job_id(host.plan) != hello.job:
            return pb.NotReady(retry_ms=_RETRY_MS)
        return host.admit(hello, link)

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
        if plan.model.base not in BASES:
            return f"base {plan.model.base!r}; node {self.name} has {', '.join(BASES)}"
        if not (plan.routes and plan.batch_size and plan.micro_batches and plan.window and plan.deadlines.round_s > 0):
            return "a plan without route, batch size, micro-batches, window or deadlines"
        return ""

    # ---------------------------------------------------------------- the compute thread

    def _work(self, part: Part, adapter: bytes, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        report = part.report
        emit = lambda event, **fields: self._emit(event, job=report.job, **fields)  # noqa: E731
        try:
            self._run_part(part, adapter, emit)
            report.state = "done"
        except EdgelamError as error:
            report.state, report.error = "failed", str(error)
        except Exception as error:  # a bug must reach the server as a message, not as silence
            report.state, report.error = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            report.peak_rss_bytes = peak_rss_bytes()
            self._hosting = None
            emit("job_done", state=report.state, error=report.error)
            part.finished.set()

    def _run_part(self, part: Part, adapter: bytes, emit: Callable[..., None]) -> None:
        plan, report, began = part.plan, part.report, time.monotonic()
        held = self._hold(plan)
        warm = self._start_from(held, plan, adapter)
        report.moments = "warm" if warm else "cold"
        layers = [[stage.span.first, stage.span.last] for stage in held.stages]
        emit(
            "job_started",
            role=pb.Role.Name(plan.role).lower(),
            layers=layers,
            seconds=round(time.monotonic() - began, 3),
        )
        if plan.role == pb.DEVICE:
            self._drive(part, held, emit)
        else:
            self._serve(part, held, emit)
        trained = {name for stage in held.stages for name, p in stage.adapter_parameters.items() if p.requires_grad}
        final = held.adapter()
        report.adapter_digest = adapters.digest(final)
        if plan.steps and report.labels_trained:
            report.adapter = adapters.to_bytes({name: array for name, array in final.items() if name in trained})
        held.moments_key = (report.adapter_digest, *_moments_flags(plan))

    def _hold(self, plan: pb.Plan) -> Held:
        spans, lora = spans_of(plan), lora_of(plan)
        key = (plan.model.digest, plan.model.base, tuple(spans), lora)
        if self._held is None or self._held.key != key:
            self._held = None  # the old slice goes before the new one comes
            source = find_model(plan.model.name)
            if source.digest != plan.model.digest:
                raise Refused(
                    f"model {plan.model.name} is {source.digest[:12]} on node {self.name} and {plan.model.digest[:12]} at the "
                    f"server: they must be the same files"
                )
            self._held = Held(key, source, load_stages(source, spans, plan.model.base, lora))
        return self._held

    def _start_from(self, held: Held, plan: pb.Plan, adapter: bytes) -> bool:
        """Takes the round's starting adapter; returns whether the optimizer's moments go on (bit-equal start) or are new."""
        if adapter:
            given = adapters.from_bytes(adapter)
            for stage in held.stages:
                stage.load_adapter(given)
        digest = adapters.digest(held.adapter())
        if digest != plan.adapter_digest:
            raise Refused(
                f"node {self.name} holds adapter {digest[:12]}, the plan starts from {plan.adapter_digest[:12]}"
            )
        trains = _trains(plan)
        parameters = [p for stage in held.stages for p in stage.set_trainable(trains)]
        warm = held.optimizer is not None and held.moments_key == (digest, *_moments_flags(plan))
        if not warm:
            held.optimizer = make_optimizer(parameters, plan.optimizer)
        return warm

    def _drive(self, part: Part, held: Held, emit: Callable[..., None]) -> None:
        plan, report = part.plan, part.report
        training, held_out = self._load_examples(plan, held)
        counters = ByteCounters()
        route = Route(Inbox(plan.deadlines.round_s))
        part.attach(route.inbox)
        driver = Driver(plan, held.stages, held.optimizer, route, emit)
        try:
            self._open_links(plan, held, route, counters)
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
        report.eval_seconds, report.train_seconds = measured.eval_seconds, measured.train_seconds
        report.compute_seconds, report.tokens_trained = measured.compute_seconds, measured.tokens_trained
        report.labels_trained, report.examples = measured.labels_trained, len(training)
        report.steps.extend(measured.steps)
        report.bytes.extend(counters.report())

    def _open_links(self, plan: pb.Plan, held: Held, route: Route, counters: ByteCounters) -> None:
        own = plan.routes[0]
        if own.hops:
            ears = (route.inbox.on_frame, route.inbox.on_lost)
            route.entry = self._open_link(plan, held, own, 0, pb.ENTRY, counters, ears)
            route.exit = self._open_link(plan, held, own, len(own.hops) - 1, pb.EXIT, counters, ears)

    def _open_link(
        self,
        plan: pb.Plan,
        held: Held,
        route: pb.Route,
        number: int,
        side: pb.LinkRole,
        counters: ByteCounters,
        ears: Ears,
    ) -> Link:
        """Dials a hop of a route and sets the link up as both ends agreed."""
        hop = route.hops[number]
        hello = pb.Hello(
            version=PROTOCOL_VERSION, job=job_id(plan), node=self.name, device_index=route.device_index, link=side,
            route_token=route.token, model_digest=held.source.digest, window=plan.window, codecs=list(CODECS),
        )  # fmt: skip
        name = f"{'entry' if side == pb.ENTRY else 'exit'} {hop.node}"
        name += f" for {route.device}" if plan.role == pb.EDGE else ""
        link, ready = self._dial(hop.address, name, hello, counters, ears, plan.deadlines)
        if ready.codec not in CODECS or not ready.window >= 1:
            raise PeerLost(f"{name} granted codec {ready.codec!r} and window {ready.window}")
        rows = -(-plan.batch_size // plan.micro_batches)
        itemsize = held.stages[0].dtype.itemsize
        link.max_tensor_bytes = rows * plan.task.max_tokens * held.source.hidden_size * itemsize
        link.job_token, link.codec = ready.job_token, ready.codec
        return link

    def _serve(self, part: Part, held: Held, emit: Callable[..., None]) -> None:
        plan, report = part.plan, part.report

        def dial_next(route: pb.Route, number: int, counters: ByteCounters, ears: Ears) -> Link:
            return self._open_link(plan, held, route, number, pb.ENTRY, counters, ears)

        host = Host(plan, held.stages[0], held.optimizer, held.source.hidden_size, dial_next, emit)
        part.attach(host.inbox)
        self._hosting = host  # from here on HELLO is answered
        reason = "the round is over"
        try:
            host.run()
        except EdgelamError as error:
            reason = str(error)
            raise
        finally:
            host.close(reason)
        report.labels_trained, report.compute_seconds = host.labels_trained, host.compute_seconds
        report.first_layer, report.last_layer = held.stages[0].span.first, held.stages[0].span.last
        report.bytes.extend(host.counters.report())

    def _load_examples(self, plan: pb.Plan, held: Held) -> tuple[list[Example], list[Example]]:
        """(training, held-out), tokenized once for the same file and settings."""
        assert self._data is not None
        task = plan.task
        key = task.SerializeToString(deterministic=True) + str(os.stat(self._data).st_mtime_ns).encode()
        if self._examples is None or self._examples[0] != key:
            language = CausalLm(
                held.source.folder, template=task.template, max_tokens=task.max_tokens, loss_on=task.loss_on
            )
            training, held_out = device_pairs(self._data, task)
            self._examples = key, (language.examples(training), language.examples(held_out))
        return self._examples[1]


def _trains(plan: pb.Plan) -> Callable[[int], bool]:
    """Which layers learn: the front, the hosts' and the back are free or frozen apart, also where no host is."""
    route, lora = plan.routes[0], plan.lora

    def trains(layer: int) -> bool:
        if plan.role == pb.DEVICE and layer < route.front:
            return lora.train_front
        if plan.role == pb.DEVICE and layer >= route.back_first:
            return lora.train_back
        return lora.train_hosts

    return trains


def _moments_flags(plan: pb.Plan) -> tuple[Any, ...]:
    return plan.lora.rank, plan.lora.train_front, plan.lora.train_hosts, plan.lora.train_back, plan.optimizer.name
