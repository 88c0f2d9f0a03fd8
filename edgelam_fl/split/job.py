"""A node's part in one round: what the plan says about it, and the inbox that its one compute thread works from."""

from __future__ import annotations

import queue
import resource
import sys
import time
from dataclasses import dataclass

import torch

from edgelam_fl.errors import PeerLost, Refused, RunFailed
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.stage import LoraSettings
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link


def job_id(plan: pb.Plan) -> str:
    """The round's attempt, the same at all nodes: what HELLO carries."""
    return f"{plan.run}/{plan.round}/{plan.attempt}"


def part_id(plan: pb.Plan) -> str:
    """This node's part in it: what Submit and Wait name."""
    return f"{job_id(plan)}/{plan.node}"


def spans_of(plan: pb.Plan) -> list[Span]:
    """The stages that the plan's node holds."""
    layers = plan.model.num_layers
    if plan.role == pb.DEVICE:
        route = plan.routes[0]
        if not route.hops:
            return [Span(0, layers, embed=True, head=True)]
        return [Span(0, route.front, embed=True), Span(route.back_first, layers, head=True)]
    hops = {(hop.first, hop.last) for route in plan.routes for hop in route.hops if hop.node == plan.node}
    if len(hops) != 1:
        raise Refused(f"the plan gives host {plan.node} {len(hops)} layer ranges; version 1 serves exactly one")
    return [Span(*hops.pop())]


def lora_of(plan: pb.Plan) -> LoraSettings:
    return LoraSettings(plan.lora.rank, plan.lora.alpha, tuple(plan.lora.targets))


def make_optimizer(parameters: list[torch.nn.Parameter], settings: pb.Optimizer) -> torch.optim.Optimizer | None:
    """AdamW without weight decay; None where nothing trains."""
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0) if parameters else None


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
