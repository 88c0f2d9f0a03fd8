"""A stage host: what the network and the ClientApp ask of a node. Plays one part at a time, each on a thread of its own.

Keeps the reports of the last parts, so that a ClientApp that lost its connection can ask again. Knows links only by `Dial`
and `admit`; knows nothing about layers or batches. Neighbours: `node.play` plays the parts,
`node.held` keeps what stays in memory between them, `node.daemon` joins the stage host with gRPC.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.errors import Busy, EdgelamError, Mismatch, Refused, Restarted, code_of
from edgelam_fl.machine import heat
from edgelam_fl.model.bases import usable_bases
from edgelam_fl.model.chip import CPU, peak_bytes
from edgelam_fl.model.lora import MOST_RANK
from edgelam_fl.model.value_ends import MOST_VALUES, ValueEnds
from edgelam_fl.node.accepted import AcceptedParts
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.front_cache import FrontCache, NamesFronts
from edgelam_fl.node.held import NodeMemory
from edgelam_fl.node.outward import outward
from edgelam_fl.node.part import Part
from edgelam_fl.node.play import Means, NodeHooks, play
from edgelam_fl.node.private_fronts import PrivateFronts
from edgelam_fl.node.profile.answer import answer_profile
from edgelam_fl.node.server_hub import ServerHub
from edgelam_fl.node.snapshots import Snapshots
from edgelam_fl.plan.fronts import host_reading_of
from edgelam_fl.plan.modes import host_mode, label_place
from edgelam_fl.plan.reading import ends_of, input_trains, job_id, not_finite, part_id, round_of
from edgelam_fl.privacy.limits import HostReading, why_refused
from edgelam_fl.split.group import RETRY_MS
from edgelam_fl.split.route import Dial
from edgelam_fl.telemetry.events import Emit, Event, JobDone, NodeProgress, SliceComing, TextReadableHere
from edgelam_fl.telemetry.events.progress import FETCHING, LOADING
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.relay import Relay

_RESULTS_KEPT = 2
_STOP_S = 5.0


class Closes(Protocol):
    """Something that is open until it is closed."""

    def close(self) -> object: ...


# the relay, what answers HELLO -> the door, open until it is closed
OpenDoor = Callable[[Relay, Callable[[pb.Hello, Link], pb.Ready | pb.NotReady | pb.Refuse]], Closes]
# the hub's address, the plan's token, what to say, what takes the answers -> the attendance, until it is closed
Attend = Callable[[str, bytes, Callable[[], pb.Beat], Callable[[pb.Notice], object]], Closes]
# the part's name, where it is -> what tells those of this machine, until it is closed
Tell = Callable[[str, Callable[[], NodeProgress]], Closes]


@dataclass(frozen=True, kw_only=True)
class StageHostTiming:
    """Waiting times: of others for a stage host, and of a stage host for itself."""

    retry_ms: int = RETRY_MS  # until a node whose job has not begun here dials again
    gone_s: float = 2.0  # for the memory of slices that are no longer needed


DEFAULT_STAGE_HOST_TIMING = StageHostTiming()
DEFAULT_HOOKS = NodeHooks()


class StageHost:
    """The stage host of one node."""

    def __init__(
        self,
        name: str,
        dial: Dial,
        emit: Emit,
        *,
        examples: DeviceExamples | None = None,
        address: str = "",
        tags: Sequence[str] = (),
        trust: str = "hosts",
        server: str = "",
        open_door: OpenDoor | None = None,
        follow: Callable[[str], Closes] | None = None,
        attend: Attend | None = None,
        tell: Tell | None = None,
        security: Security = PLAIN,
        state: Path | None = None,
        chip: torch.device = CPU,
        bounds: Bounds = DEFAULT_BOUNDS,
        hooks: NodeHooks = DEFAULT_HOOKS,
        timing: StageHostTiming = DEFAULT_STAGE_HOST_TIMING,
    ) -> None:
        """Loads nothing yet.

        `examples`: a device's; None makes it an edge server. `address`: where others reach its data plane, empty if they
        cannot; may be set until the first profile is asked for. `tags`: words by which a run may choose the node. `trust`: what a
        device's owner lets hosts read of its text, as split.trust; a plan that leaks more is refused. `server`:
        host of its server, where the hub is. `open_door`: lets others in by way of the hub; None: they dial the node alone.
        `follow`: listens at the hub's address to whose membership has ended; None: nobody's ends here. `attend`: attends at
        the hub while a part is played; None: nobody knows whether this node lives. `tell`: tells those of this machine where a part is;
        None: nobody is told. `security`: how the node calls the hub. `state`: the node's folder, for what stays with it over restarts; None: nothing does. `chip`: what the
        node computes on. `bounds`: the modules that a run may take metrics of its own from.
        """
        self.name, self.address = name, address
        self.role = pb.EDGE if examples is None else pb.DEVICE
        self._emit, self._tags, self._trust, self._examples, self._chip = emit, tuple(tags), trust, examples, chip
        self._open_door, self._follow, self._attend, self._tell, self._timing = open_door, follow, attend, tell, timing
        self._epoch = secrets.randbits(63) + 1
        self._accepted = AcceptedParts(state)
        self._hub = ServerHub(server, self.hear_of_slices, security)
        self._coming: SliceComing | None = None  # what comes from the hub at this moment
        self._snapshots = Snapshots(state, emit)
        load = partial(hooks.load, chip=chip)
        memory = NodeMemory(load, self._hub.find_planned, timing.gone_s, PrivateFronts(state), self._snapshots)
        self._means = Means(
            dial=dial, hub=self._hub, memory=memory, examples=examples, hooks=hooks, snapshots=self._snapshots,
            bounds=bounds, kept_fronts=FrontCache(state, hooks.disk_free), names_fronts=NamesFronts(state),
        )  # fmt: skip
        self._reading: HostReading | None = None  # of the newest part, as it was said; for the thread of a part alone
        self._lock = threading.Lock()  # guards the three below
        self._parts: dict[str, Part] = {}
        self._current: Part | None = None
        self._worker: threading.Thread | None = None

    # ---------------------------------------------------------------- what others ask, on any thread

    def profile(self, request: pb.ProfileRequest) -> pb.Profile:
        """Answers what the node can do; measures what the request asks for, which may take minutes."""
        trust = "" if self._examples is None else self._trust
        own = pb.Profile(name=self.name, role=self.role, address=self.address, tags=self._tags, trust=trust)
        return answer_profile(request, own, self._examples, self._hub, self._emit, self._chip, self._means.bounds)

    def submit(self, request: pb.SubmitRequest) -> pb.SubmitReply:
        """Begins a part and returns at once. A part that is known here is not begun again, and takes the tensors that it asked for.

        Nor is one that a restart has made unknown, if its update would leave the device with noise of its own: each attempt counts once.
        A new part cancels the current one; that of another run only if the server says that the other run does not go on.
        """
        refusal = _refusal(request.plan, self.name, self.role, usable_bases(self._chip)) or _leak(
            request.plan, self._trust
        )
        if refusal:
            return pb.SubmitReply(accepted=False, reason=refusal, code=Mismatch.code)
        with self._lock:
            part, other = self._parts.get(part_id(request.plan)), self._other_run(request.plan)
            if part is None and other:
                return pb.SubmitReply(
                    accepted=False, reason=f"node {self.name} is busy with run {other}", code=Busy.code
                )
            if part is None and request.plan.privacy.update_clip and self._accepted.knows(part_id(request.plan)):
                return pb.SubmitReply(accepted=False, reason=self._sent_once(request.plan), code=Restarted.code)
            if part is None:
                self._begin(Part(request.plan, self._emit), request)
            else:
                part.give(request.adapter)
        return pb.SubmitReply(accepted=True)

    def wait(self, request: pb.WaitRequest) -> pb.JobReport:
        """Returns the part's report; its state is "running" if the part is not over after `timeout_s` seconds.

        It is "needs" as soon as the part asks for tensors. A part that is not known here failed with code "restarted", and its
        report has the snapshots that are left of its round.
        """
        part = self._part(request.job)
        if part is not None:
            return part.wait(request.timeout_s)
        run, round_ = round_of(request.job)
        error = f"the stage host of {self.name} no longer has job {request.job}: it was started again, or has had newer ones since"
        return pb.JobReport(
            job=request.job, node=self.name, role=self.role, state="failed", error=error, code=Restarted.code,
            snapshots=self._snapshots.steps(run, round_),
        )  # fmt: skip

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse:
        """Answers a handshake of the data plane; opens the link if the answer is READY."""
        part = self._part(f"{hello.job}/{self.name}")  # as `part_id`
        group = part.group if part is not None else None
        if group is not None:
            return group.admit(hello, link)
        if part is not None and part.report.state == "failed":
            return pb.Refuse(reason=f"node {self.name} has given up its part of {hello.job}; the server has the reason")
        if part is None and self._accepted.was_before(f"{hello.job}/{self.name}"):
            return pb.Refuse(reason=f"node {self.name} was restarted; it no longer has its part of {hello.job}")
        return pb.NotReady(retry_ms=self._timing.retry_ms)

    def hear_of_slices(self, event: Event) -> None:
        """Takes what is said of slices that come from the hub: the part that waits for them is at work on this thread."""
        self._coming = event if isinstance(event, SliceComing) else None
        self._emit(event)

    def stop(self) -> None:
        """Cancels the current part, and waits some seconds for its end."""
        with self._lock:
            part, worker = self._current, self._worker
        if part is not None:
            part.cancel(f"node {self.name} is shutting down")
        if worker is not None:
            worker.join(timeout=_STOP_S)
        self._means.kept_fronts.close()

    def _other_run(self, plan: pb.Plan) -> str:
        """Returns the run that this node plays for, if it is another and goes on, as far as its server knows. The caller holds the lock."""
        current = self._current
        if current is None or current.is_over or plan.alone or current.plan.run == plan.run:
            return ""
        return current.plan.run

    def _sent_once(self, plan: pb.Plan) -> str:
        return (
            f"node {self.name} was started again and has had its part of {job_id(plan)} before: a second update with new noise would "
            f"give away more than the round is accounted for"
        )

    def _part(self, name: str) -> Part | None:
        with self._lock:
            return self._parts.get(name)

    # ---------------------------------------------------------------- the thread of a part

    def _begin(self, part: Part, request: pb.SubmitRequest) -> None:
        """Starts the thread of a part, which waits for the part before. The caller holds the lock."""
        if self._current is not None:
            self._current.cancel(f"{part.id} takes its place")
        previous, self._current = self._worker, part
        self._parts[part.id] = part
        self._accepted.note(part.id)
        while len(self._parts) > _RESULTS_KEPT:
            self._parts.pop(next(iter(self._parts)))
        self._worker = threading.Thread(
            target=self._attend_and_work, args=(part, request, previous), name="compute", daemon=True
        )
        self._worker.start()

    def _attend_and_work(self, part: Part, request: pb.SubmitRequest, previous: threading.Thread | None) -> None:
        with self._telling(part), self._attending(part):
            self._work(part, request, previous)

    def _work(self, part: Part, request: pb.SubmitRequest, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        self._coming = None
        report, full = part.report, ""
        self._say_what_is_readable(part)
        try:
            part.check()
            with self._following(part), self._door(part):
                play(part, request, self._means)
            report.state = "done"
        except Exception as error:  # noqa: BLE001 - a bug must reach the server as a message too, not as silence
            report.state, report.error = "failed", outward(self.name, error, part.id)
            report.code = code_of(error)
            full = str(error) if isinstance(error, EdgelamError) else f"{type(error).__name__}: {error}"
        finally:
            report.peak_rss_bytes = peak_bytes(self._chip)
            now = heat()
            report.celsius, report.slowed = now.celsius or 0.0, now.slowed
            report.snapshots.extend(self._snapshots.steps(part.plan.run, part.plan.round))
            part.group = None
            self._means.kept_fronts.end(part.plan)
            part.emit(JobDone(state=report.state, error=full))
            part.end()

    def _say_what_is_readable(self, part: Part) -> None:
        reading = host_reading_of(part.plan)
        if reading is not None and reading != self._reading:
            part.emit(TextReadableHere(text=reading.text, labels=reading.labels, words=reading.words()))
        self._reading = reading

    def _following(self, part: Part) -> AbstractContextManager[object]:
        """Returns what hears of memberships that end, while the part is played."""
        hub = self._hub.address(part.plan.hub_port)
        return closing(self._follow(hub)) if self._follow is not None and hub else nullcontext()

    def _attending(self, part: Part) -> AbstractContextManager[object]:
        """Returns what shows the server that the part is played, and brings the part what the server decides."""
        hub, token = self._hub.address(part.plan.hub_port), part.plan.attend_token
        if self._attend is None or not (hub and token):
            return nullcontext()
        return closing(self._attend(hub, token, lambda: part.beat(self._epoch, self._progress(part)), part.hear))

    def _telling(self, part: Part) -> AbstractContextManager[object]:
        """Returns what tells those of this machine where the part is."""
        if self._tell is None:
            return nullcontext()
        return closing(self._tell(part.id, partial(self._progress, part)))

    def _progress(self, part: Part) -> NodeProgress:
        """Returns where a part is, on any thread: also how much of its layers has come, which the part itself does not know."""
        progress, coming = part.progress(), self._coming
        if progress.doing != LOADING or coming is None:
            return progress
        return replace(progress, doing=FETCHING, bytes=coming.bytes, of_bytes=coming.of)

    def _door(self, part: Part) -> AbstractContextManager[object]:
        """Returns a door at the hub for nodes that cannot dial this one, open while the part is played."""
        hub, token = self._hub.address(part.plan.hub_port), part.plan.relay_token
        if self._open_door is None or not (hub and token):
            return nullcontext()
        return closing(self._open_door(Relay(hub, token), self.admit))


def _leak(plan: pb.Plan, trust: str) -> str:
    """Returns why a device's owner, who trusts like this, does not allow the plan; empty: it is allowed."""
    reading = host_reading_of(plan)
    problem = why_refused(trust, reading) if reading is not None else ""
    return problem and f"--trust {trust} of node {plan.node} refuses the plan: {problem}"


def _refusal(plan: pb.Plan, name: str, role: pb.Role, bases: Sequence[str]) -> str:
    """Returns why a node cannot take the plan; empty if it can. `bases`: those that the node computes with."""
    own = f"{pb.Role.Name(role)} {name!r}"
    if plan.protocol_version != PROTOCOL_VERSION:
        return f"a plan of protocol version {plan.protocol_version}; node {name} speaks {PROTOCOL_VERSION}"
    if plan.node != name or plan.role != role:
        return f"a plan for {pb.Role.Name(plan.role)} {plan.node!r}; this is {own}"
    if plan.model.base not in bases:
        return f"base {plan.model.base!r}; node {name} has {', '.join(bases)} (`edgelam doctor` there says why)"
    routes = plan.routes or plan.serves
    if not (routes and plan.batch_size and plan.micro_batches and plan.window and plan.deadlines.round_s > 0):
        return "a plan without route, batch size, micro-batches, window or deadlines"
    if place := not_finite(plan):
        return f"a plan whose {place} holds a number that is not finite"
    if (rank := max([plan.lora.rank, *(terms.rank for terms in plan.lora.own)])) > MOST_RANK:
        return f"a plan with adapters of rank {rank}; at most {MOST_RANK} is allowed"
    for values in (ends.features, ends.outputs) if isinstance(ends := ends_of(plan), ValueEnds) else ():
        if not 1 <= values <= MOST_VALUES:
            return f"a plan with {values} values per token; 1 to {MOST_VALUES} are allowed"
    if plan.front_cache_bytes and (
        plan.lora.train_front or input_trains(plan) or plan.lora.dropout or plan.model.own_dropout or plan.cut.clip
    ):
        return "a plan that keeps the states of fronts, which are others in every step of it"
    if len(plan.routes) != (role == pb.DEVICE and not plan.generate):
        return f"a plan with {len(plan.routes)} routes of its own for {own}"
    if len(plan.optimizer.lrs) != plan.steps:
        return f"a plan of {plan.steps} steps with {len(plan.optimizer.lrs)} learning rates"
    try:
        host_mode(plan.host_mode), label_place(plan.labels)
    except Refused as error:
        return str(error)
    return ""
