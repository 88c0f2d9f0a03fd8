"""Opening a node's links as its plan says: a device's to both ends of its route, a host's to the next one.

Knows plans and handshakes; how bytes travel is `Dial`'s: `wire.grpc.dial`, or `memory_dial` inside one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from edgelam_fl.errors import PeerLost, Refused
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.reading import job_id, link_name, part_id, unit_rows
from edgelam_fl.split.inbox import Inbox, Lost
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs.raw import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Ears, Frame, Link
from edgelam_fl.wire.memory import memory_pair
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.relay import Relay

# address, link name, hello, counters, ears, deadlines, the way round -> an open link and READY
Dial = Callable[[str, str, pb.Hello, ByteCounters, Ears, pb.Deadlines, Relay | None], tuple[Link, pb.Ready]]
_MEMORY_RETRY_S = 0.01


class Admits(Protocol):
    """A stage host, as whoever dials it sees it."""

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse: ...


def memory_dial(nodes: Mapping[str, Admits]) -> Dial:
    """Links between stage hosts of one process: an address is a node's name. `nodes` may still grow."""

    def dial(
        address: str, name: str, hello: pb.Hello, counters: ByteCounters, ears: Ears, deadlines: pb.Deadlines,
        relay: Relay | None = None,
    ) -> tuple[Link, pb.Ready]:  # fmt: skip
        end = time.monotonic() + deadlines.ready_s
        while time.monotonic() < end:
            # what the host's end counts, the host's group sets
            ours, theirs = memory_pair(name, counters, ByteCounters())
            ours.attach(*ears)
            answer = nodes[address].admit(hello, theirs)
            if isinstance(answer, pb.Ready):
                return ours, answer
            if isinstance(answer, pb.Refuse):
                raise Refused(f"{name} refuses: {answer.reason}")
            time.sleep(_MEMORY_RETRY_S)
        raise PeerLost(f"{name} has not received this job within {deadlines.ready_s:.0f} s")

    return dial


def open_link(
    dial: Dial,
    plan: pb.Plan,
    source: ModelSource,
    route: pb.Route,
    number: int,
    side: pb.LinkRole,
    counters: ByteCounters,
    ears: Ears,
    hub: str = "",
) -> tuple[Link, int]:
    """Dials a hop of a route and sets the link up as both ends agreed; returns it with the window granted.

    `hub`: HOST:PORT of the server's, which relays where the hop cannot be reached; empty: there is none.
    """
    hop = route.hops[number]
    hello = pb.Hello(
        version=PROTOCOL_VERSION, job=job_id(plan), node=plan.node, device_index=route.device_index, link=side,
        route_token=route.token, model_digest=source.digest, window=plan.window, codecs=list(CODECS),
    )  # fmt: skip
    name = link_name(plan, route, number, side)
    relay = Relay(hub, part_id(plan, hop.node), hop.relay_token) if hub and hop.relay_token else None
    link, ready = dial(hop.address, name, hello, counters, ears, plan.deadlines, relay)
    if ready.codec not in CODECS or not ready.window >= 1:
        raise PeerLost(f"{name} granted codec {ready.codec!r} and window {ready.window}")
    link.max_tensor_bytes = unit_rows(plan) * plan.task.max_tokens * source.hidden_size * wire_dtype(plan).itemsize
    link.job_token, link.codec = ready.job_token, ready.codec
    return link, ready.window


def open_route(
    dial: Dial,
    plan: pb.Plan,
    source: ModelSource,
    route: Route,
    counters: ByteCounters,
    on_sent: Callable[[pb.Header, float, float], None] | None = None,
    hub: str = "",
) -> None:
    """A device's two links, into `route`; over no host there is nothing to open. One pace for all that it sends.

    `hub`: as of `open_link`.
    """
    own = plan.routes[0]
    if not own.hops:
        return
    ears = (route.inbox.on_frame, route.inbox.on_lost)
    route.entry, entry_window = open_link(dial, plan, source, own, 0, pb.ENTRY, counters, ears, hub)
    route.exit, exit_window = open_link(dial, plan, source, own, len(own.hops) - 1, pb.EXIT, counters, ears, hub)
    route.window = min(plan.window, entry_window, exit_window)
    pace = Pace(own.share_bps / 8) if own.share_bps else None
    for link in (route.entry, route.exit):
        link.pace, link.on_sent = pace, on_sent


def new_route(plan: pb.Plan) -> Route:
    return Route(Inbox(plan.deadlines.round_s), window=plan.window)


def wire_dtype(plan: pb.Plan) -> torch.dtype:
    """What travels on every link of the run, whatever a node computes in."""
    return torch.bfloat16 if plan.model.wire == "bfloat16" else torch.float32


@dataclass
class Route:
    """The links of one device and the inbox behind them. Both links are None on a route over no host."""

    inbox: Inbox
    entry: Link | None = None
    exit: Link | None = None
    window: int = 1  # micro-batches that may be in flight, as all hosts granted

    def next(self, timeout_s: float, what_for: str) -> Frame:
        """The next frame from the hosts. Raises PeerLost when a link is lost, a host ends the job, or nothing comes."""
        arrival = self.inbox.get(timeout_s)
        if arrival is None:
            raise PeerLost(f"nothing came from the hosts for {timeout_s:.0f} s ({what_for})")
        link, item = arrival
        if isinstance(item, Lost):
            raise PeerLost(f"link {link.name}: {item.reason}")
        if item.header.kind == pb.CANCEL:
            raise PeerLost(f"{link.name} ended the job: {item.header.cancel.reason}")
        return item
