"""A node's part in one round: what the plan says about it, and the inbox that its one compute thread works from."""

from __future__ import annotations

import hashlib
import queue
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import PeerLost, RunFailed
from edgelam_fl.model.stage import LoraSettings
from edgelam_fl.split.plan import job_id, part_id
from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

__all__ = [
    "Inbox",
    "Lost",
    "Timeline",
    "ends_train",
    "hosted_trains",
    "job_id",
    "lora_of",
    "part_id",
    "peak_rss_bytes",
    "task_of",
    "unit_seed",
]

_INTERVALS_KEPT = 400


def lora_of(plan: pb.Plan) -> LoraSettings:
    return LoraSettings(plan.lora.rank, plan.lora.alpha, tuple(plan.lora.targets), plan.lora.dropout)


def task_of(plan: pb.Plan, tokenizer_folder: Path) -> Task:
    task = plan.task
    return make_task(
        task.kind, tokenizer_folder, template=task.template, max_tokens=task.max_tokens, loss_on=task.loss_on,
        classes=tuple(task.classes), weighting=task.weighting or "labels",
    )  # fmt: skip


def ends_train(plan: pb.Plan) -> Callable[[int | None], bool]:
    """Which of a device's own layers learn: front, middle and back apart, also where no host is.

    What stands outside the layers (None: a task's head) belongs to the back.
    """
    route, lora = plan.routes[0], plan.lora

    def learns(layer: int | None) -> bool:
        if layer is None or layer >= route.back_first:
            return lora.train_back
        return lora.train_front if layer < route.front else lora.train_hosts

    return learns


def hosted_trains(plan: pb.Plan) -> Callable[[int | None], bool]:
    return lambda layer: plan.lora.train_back if layer is None else plan.lora.train_hosts


def unit_seed(plan: pb.Plan, device: str, step: int, micro_batch: int) -> int | None:
    """What a unit's dropout masks are drawn from, the same at every stage of its route; None without dropout."""
    if not plan.lora.dropout:
        return None
    unit = f"{plan.seed}/{device}/{plan.optimizer.step_offset + step}/{micro_batch}"
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "little") >> 1


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Timeline:
    """Who did what, when, in a train phase: the newest few hundred intervals of one role at one node."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._zero = 0.0  # monotonic, when the phase opened; nothing is kept before
        self._intervals: deque[pb.Interval] = deque(maxlen=_INTERVALS_KEPT)

    def open(self) -> None:
        self._zero = self._zero or time.monotonic()

    @contextmanager
    def interval(self, kind: str, header: pb.Header, peer: str = "") -> Iterator[None]:
        began = time.monotonic()
        yield
        self._add(kind, began, time.monotonic(), header, peer)

    def sent(self, header: pb.Header, queued: float, left: float) -> None:
        """A tensor's way from the queue into the network; called by the sender."""
        self._add("send", queued, left, header, "", header.tensor.total_bytes)

    def _add(self, kind: str, began: float, ended: float, header: pb.Header, peer: str, tensor_bytes: int = 0) -> None:
        if self._zero and began >= self._zero:
            self._intervals.append(
                pb.Interval(
                    kind=kind,
                    role=self._role,
                    start_s=round(began - self._zero, 4),
                    seconds=round(ended - began, 4),
                    step=header.step,
                    micro_batch=header.micro_batch,
                    peer=peer,
                    tensor_bytes=tensor_bytes,
                )
            )

    def report(self) -> list[pb.Interval]:
        return list(self._intervals)


@dataclass(frozen=True)
class Lost:
    reason: str


@dataclass(frozen=True)
class Cancelled:
    reason: str


class Inbox:
    """What arrived on any link of a job, in order; filled by transport threads, emptied by the compute thread."""

    def __init__(self, round_s: float) -> None:
        self._queue: queue.SimpleQueue[tuple[Link | None, Frame | Lost | Cancelled]] = queue.SimpleQueue()
        self._end = time.monotonic() + round_s

    def on_frame(self, link: Link, frame: Frame) -> None:
        self._queue.put((link, frame))

    def on_lost(self, link: Link, reason: str) -> None:
        self._queue.put((link, Lost(reason)))

    def cancel(self, reason: str) -> None:
        self._queue.put((None, Cancelled(reason)))

    def empty(self) -> bool:
        return self._queue.empty()

    def get(self, timeout_s: float) -> tuple[Link, Frame | Lost] | None:
        """The next arrival, or None after `timeout_s`. Raises RunFailed when the job is cancelled or out of time."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise PeerLost("the round's deadline has passed (federation.round_deadline_s)")
        try:
            link, item = self._queue.get(timeout=max(0.0, min(timeout_s, left)))
        except queue.Empty:
            return None
        if isinstance(item, Cancelled):
            raise RunFailed(item.reason)
        assert link is not None  # only Cancelled comes without a link
        return link, item
