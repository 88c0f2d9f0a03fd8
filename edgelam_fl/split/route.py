"""Opens the links that a plan asks for: a device's to both ends of its route, a host's to the next host.

Knows plans and handshakes; does not know how bytes travel, which a `Dial` does: `wire.grpc.dial`, or `memory_dial` inside one
process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from edgelam_fl.errors import PeerLost, Refused, RunFailed
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.reading import codecs_of, job_id, link_name, unit_positions
from edgelam_fl.split.inbox import Inbox, Lost
from edgelam_fl.telemetry.events import EmitInJob, LinkResumed, LinkSuspended
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import CODEC_BYTES
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.memory import memory_pair
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.relay import Relay
from edgelam_fl.wire.terms import MakeTerms, OnResumed, OnSent, OnSuspended, link_terms

# host, its address, link name, hello, counters, terms, seconds until the host must be ready, relay to try, what returns why the
# link is no longer wanted (empty: it is) -> an open link
Dial = Callable[[str, str, str, pb.Hello, ByteCounters, MakeTerms, float, Relay | None, Callable[[], str]], Link]
_MEMORY_RETRY_S = 0.01


class Admits(Protocol):
    """A stage host, as seen by those who dial it."""

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse:
        """Answers a handshake; opens the link if the answer is READY."""
        ...


def memory_dial(nodes: Mapping[str, Admits]) -> Dial:
    """Returns a dial between stage hosts of one process, which `nodes` holds by name; it may still grow."""

    def dial(
        node: str, address: str, name: str, hello: pb.Hello, counters: ByteCounters, make_terms: MakeTerms, ready_s: float,
        relay: Relay | None = None, given_up: Callable[[], str] = lambda: "",
    ) -> Link:  # fmt: skip
        end = time.monotonic() + ready_s
        while time.monotonic() < end:
            if reason := given_up():
                raise RunFailed(reason)
            ours, theirs = memory_pair(name, counters, ByteCounters())
            with theirs.holding_back():
                answer = nodes[node].admit(hello, theirs)
                if isinstance(answer, pb.Ready):
                    ours.open(make_terms(name, counters, answer))
                    return ours
            if isinstance(answer, pb.Refuse):
                raise Refused(f"{name} refuses: {answer.reason}")
            time.sleep(_MEMORY_RETRY_S)
        raise PeerLost(f"{name} has not received this job within {ready_s:.0f} s")

    return dial


def open_link(
    dial: Dial,
    plan: pb.Plan,
    source: ModelSource,
    route: pb.Route,
    number: int,
    side: pb.LinkRole,
    counters: ByteCounters,
    make_terms: MakeTerms,
    inbox: Inbox,
    hub: str = "",
) -> Link:
    """Dials a hop of a route and returns the open link.

    `number`: of the hop. `inbox`: of the part that wants the link. `hub`: HOST:PORT of the server's hub, the relay for hops that
    cannot be reached; empty: no hub. Raises RunFailed as soon as the part is cancelled, and what `dial` raises.
    """
    hop = route.hops[number]
    hello = pb.Hello(
        version=PROTOCOL_VERSION, job=job_id(plan), node=plan.node, device_index=route.device_index, link=side,
        route_token=route.token, model_digest=source.digest, window=plan.window, codecs=list(CODECS),
    )  # fmt: skip
    name = link_name(plan, route, number, side)
    token = hop.relay_tokens.get(plan.node)
    relay = Relay(hub, token) if hub and token else None
    ready_s = plan.deadlines.ready_s
    return dial(hop.node, hop.address, name, hello, counters, make_terms, ready_s, relay, lambda: inbox.cancelled)


def most_bytes(plan: pb.Plan, hidden_size: int) -> int:
    """Returns the size of the largest tensor on any link of the plan, encoded or decoded: hidden states of a micro-batch, or its labels."""
    values, item_bytes = hidden_size + plan.lowrank.rank, wire_dtype(plan).itemsize
    encoded = [CODEC_BYTES[codec].bytes_of_row(values, item_bytes) for codec in codecs_of(plan) if codec in CODEC_BYTES]
    return unit_positions(plan, pb.EVAL) * max(values * item_bytes, torch.int64.itemsize, *encoded)


def open_route(
    dial: Dial,
    plan: pb.Plan,
    source: ModelSource,
    route: Route,
    counters: ByteCounters,
    emit: EmitInJob,
    on_sent: OnSent | None = None,
    hub: str = "",
) -> None:
    """Opens the two links of a device and puts them into `route`; opens nothing if the plan's route has no host.

    Both links share one pace. `hub`: as of `open_link`.
    """
    own = plan.routes[0]
    if not own.hops:
        return
    on_suspended, on_resumed = link_events(emit)
    make_terms = partial(
        link_terms, most_bytes=most_bytes(plan, source.hidden_size), silent_s=plan.deadlines.silent_s,
        reconnect_s=plan.deadlines.reconnect_s, pace=Pace(own.share_bps / 8) if own.share_bps else None,
        on_frame=route.inbox.on_frame, on_lost=route.inbox.on_lost, on_sent=on_sent, on_suspended=on_suspended,
        on_resumed=on_resumed,
    )  # fmt: skip
    route.entry = open_link(dial, plan, source, own, 0, pb.ENTRY, counters, make_terms, route.inbox, hub)
    route.exit = open_link(dial, plan, source, own, len(own.hops) - 1, pb.EXIT, counters, make_terms, route.inbox, hub)
    route.window = min(plan.window, route.entry.terms.window, route.exit.terms.window)


def link_events(emit: EmitInJob) -> tuple[OnSuspended, OnResumed]:
    """Returns what a link's terms call when it has lost its stream, and when it goes on."""

    def on_suspended(link: Link, reason: str) -> None:
        emit(LinkSuspended(link=link.name, reason=reason))

    def on_resumed(link: Link, seconds: float, resent_bytes: int) -> None:
        emit(LinkResumed(link=link.name, seconds=round(seconds, 3), resent_bytes=resent_bytes))

    return on_suspended, on_resumed


def new_route(plan: pb.Plan) -> Route:
    """Returns the route of a plan's device, with no link open yet."""
    return Route(Inbox(plan.deadlines.round_s), window=plan.window)


def wire_dtype(plan: pb.Plan) -> torch.dtype:
    """Returns the dtype in which hidden states travel on every link of the run, whatever a node computes in."""
    return torch.bfloat16 if plan.model.wire == "bfloat16" else torch.float32


@dataclass
class Route:
    """The links of one device and the inbox behind them. Both links are None as long as they are not open, or without hosts."""

    inbox: Inbox
    entry: Link | None = None
    exit: Link | None = None
    window: int = 1  # micro-batches that may be under way; the least that a host granted

    def receive(self, timeout_s: float, what_for: str) -> Frame:
        """Returns the next frame from the hosts.

        `what_for`: names the wait in the message. Raises PeerLost if a link is lost, a host ends the job, or nothing comes
        for `timeout_s` seconds.
        """
        arrival = self.inbox.get(timeout_s)
        if arrival is None:
            raise PeerLost(f"nothing came from the hosts for {timeout_s:.0f} s ({what_for})")
        assert isinstance(arrival, tuple)  # all else is for hosts alone
        link, item = arrival
        if isinstance(item, Lost):
            raise PeerLost(f"link {link.name}: {item.reason}")
        if item.header.kind == pb.CANCEL:
            raise PeerLost(f"{link.name} ended the job: {item.header.cancel.reason}")
        return item
