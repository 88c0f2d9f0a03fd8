"""The devices that a host serves in a round, and the links to them and to the neighbours in the chain.

Lets links in, passes the coordinator's words up the chain, notes who is lost and why. Knows nothing about layers or steps;
`split.host` computes, `wire.link` brings the frames.

Hosts stand in a chain; a device reaches the first by its entry link and the last by its exit link. The last one
coordinates: what it decides goes to the devices and up the chain along every route's links.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from edgelam_fl.errors import EdgelamError, PeerLost
from edgelam_fl.plan.reading import job_id
from edgelam_fl.split.inbox import Inbox
from edgelam_fl.split.member import Member
from edgelam_fl.split.route import most_bytes
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.terms import LinkTerms, MakeTerms, OnSent, link_terms

_RETRY_MS = 200

# route, hop number, counters, terms -> an open entry link to that hop
DialNext = Callable[[pb.Route, int, ByteCounters, MakeTerms], Link]


class Group:
    def __init__(
        self,
        plan: pb.Plan,
        hidden_size: int,
        wire: torch.dtype,
        window: int,
        dial: DialNext,
        emit: Callable[..., None],
    ) -> None:
        """`window`: the micro-batches of one device that this host has memory for."""
        self.plan, self.window, self.emit = plan, window, emit
        self.hidden_size, self.wire = hidden_size, wire
        self.counters = ByteCounters()
        self._dial = dial
        chain = [hop.node for hop in plan.serves[0].hops]
        self.position, self.coordinates = chain.index(plan.node), chain[-1] == plan.node
        self.chain_length = len(chain)
        self.inbox = Inbox(plan.deadlines.round_s)
        self.members = {route.device_index: Member(route, route.hops[self.position]) for route in plan.serves}
        self.on_sent: OnSent | None = None
        self._door = threading.Lock()
        self._owners: dict[int, Member] = {}
        self._paces: dict[int, Pace] = {}

    # ---------------------------------------------------------------- links come and go

    def admit(self, hello: pb.Hello, link: Link) -> pb.Ready | pb.NotReady | pb.Refuse:
        """The handshake's verdict, from any thread; attaches to the link before READY leaves."""
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
        if not entry and not self.coordinates:
            return pb.Refuse(reason=f"node {hello.node!r} dials its exit here, and this is not its route's last host")
        if self.window < 1:
            return pb.Refuse(
                reason=f"host {self.plan.node} has no memory for a micro-batch of each of {len(self.members)} devices; smaller "
                f"ones (federation.batch_size, split.micro_batches, task.max_tokens) or split.checkpointing would help"
            )
        side = "entry" if entry else "exit"
        with self._door:
            if (member.upstream if entry else member.downstream) is not None or member.gone:
                return pb.Refuse(reason=f"the {side} link of {hello.node!r} was opened before")
            if entry and not self.coordinates and not member.window:
                return pb.NotReady(retry_ms=_RETRY_MS)  # the way down is not open: what it grants bounds what we grant
            granted = self._granted(hello.window, *([member.window] if entry and not self.coordinates else []))
            ready = pb.Ready(
                version=PROTOCOL_VERSION, window=granted, codec=shared[0], job_token=hello.device_index + 1
            )
            to_device = not entry or self.position == 0  # else within the chain, where nothing is paced
            pace = self._pace_to(member) if to_device else None
            link.open(self._make_terms()(f"{side} {member.route.device}", self.counters, ready, pace=pace))
            self._owners[id(link)] = member
            if entry:
                member.upstream = link
            else:
                member.downstream, member.window = link, self._granted(hello.window)
        return ready

    def _make_terms(self) -> partial[LinkTerms]:
        return partial(
            link_terms, most_bytes=most_bytes(self.plan, self.hidden_size), silent_s=self.plan.deadlines.silent_s,
            on_frame=self.inbox.on_frame, on_lost=self.inbox.on_lost, on_sent=self.on_sent,
        )  # fmt: skip

    def _granted(self, *windows: int) -> int:
        return min(self.window, self.plan.window, *(window for window in windows if window))

    def _pace_to(self, member: Member) -> Pace | None:
        """One bucket a device for all that goes down to it from here; two hosts (first and last) take half each."""
        share_bps = member.route.share_bps
        if not share_bps:
            return None
        ends = 1 if self.chain_length == 1 else 2
        return self._paces.setdefault(member.index, Pace(share_bps / 8 / ends))

    def dial_downstream(self) -> None:
        """Opens every route's link to the next host; a device whose way cannot be opened is out."""
        for member in self.members.values():
            try:
                link = self._dial(member.route, self.position + 1, self.counters, self._make_terms())
            except EdgelamError as error:
                self.dismiss(member, str(error))
                continue
            with self._door:
                self._owners[id(link)] = member
                member.downstream, member.window = link, link.terms.window

    def gather(self, take: Callable[[], object]) -> None:
        """Waits for the devices, until all are here or the deadline. `take` handles what arrives meanwhile.

        Raises PeerLost with fewer than `min_devices` of them.
        """
        end = time.monotonic() + self.plan.deadlines.ready_s
        while time.monotonic() < end and not all(m.present or m.gone for m in self.members.values()):
            take()
        with self._door:
            for member in self.members.values():
                if not member.present and not member.gone:
                    self.dismiss(member, f"not here after {self.plan.deadlines.ready_s:.0f} s")
        here = sum(member.present for member in self.members.values())
        if here < self.plan.min_devices:
            raise PeerLost(f"{here} of {len(self.members)} devices came; at least {self.plan.min_devices} are needed")

    def close(self, reason: str) -> None:
        """Ends all links; those still open hear why."""
        for member in self.members.values():
            for link in (member.upstream, member.downstream):
                if link is not None:
                    if not member.done:
                        link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                    link.close()

    # ---------------------------------------------------------------- who is here

    def owner(self, link: Link) -> Member:
        return self._owners[id(link)]

    def active(self) -> list[Member]:
        return [member for member in self.members.values() if member.active]

    def check_enough(self) -> None:
        """Raises PeerLost when every device was lost."""
        if not any(member.done for member in self.members.values()):
            raise PeerLost(
                "every device was lost: " + "; ".join(f"{m.route.device}: {m.gone}" for m in self.members.values())
            )

    def lose(self, member: Member, link: Link | None, reason: str) -> None:
        """A link failed. The coordinator lets the device go; the others stop its forward passes, pass that on, and wait:
        gradients of a step that the coordinator has closed with it are still on their way up."""
        if self.coordinates or link is member.downstream:
            self.dismiss(member, reason)
        elif not member.leaving and not member.gone:
            self._note_loss(member, reason)
            cancel = pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason))
            relay(member.upstream, cancel)
            relay(member.downstream, cancel)
            if member.upstream is not None:
                member.upstream.close()

    def _note_loss(self, member: Member, reason: str) -> None:
        if not member.leaving:
            member.leaving = reason
            member.forwards.clear()
            self.emit("link_lost", link=member.route.device, reason=reason)

    def dismiss(self, member: Member, reason: str) -> None:
        """A device is out of the round: its unfinished micro-batches go, its earlier steps stay."""
        if member.gone:
            return
        self._note_loss(member, reason)
        member.gone = member.leaving
        member.caches.clear()
        for link in (member.upstream, member.downstream):
            if link is not None and not link.closed:
                link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                link.close()

    # ---------------------------------------------------------------- words along the chain

    def done(self, member: Member, link: Link, header: pb.Header) -> None:
        """DONE, told on both links: the first to be read must not look like a loss. On to the route's other hosts."""
        member.done = not member.gone
        if link is member.upstream and not self.coordinates:
            relay(member.downstream, header)
        elif link is member.downstream:
            self.pass_up(member, header)

    def decide(self, members: list[Member], header: pb.Header) -> None:
        """The coordinator's word, to devices and up every chain."""
        for member in members:
            if member.active:
                relay(member.downstream, header)
                self.pass_up(member, header)

    def pass_up(self, member: Member, header: pb.Header) -> None:
        """To the host before; the device itself hears the coordinator on its exit link."""
        if self.position > 0:
            relay(member.upstream, header)

    def pass_down(self, header: pb.Header) -> None:
        """To the next host, on any link that is open."""
        member = next((m for m in self.active() if m.downstream is not None), None)
        if member is not None:
            relay(member.downstream, header)


def relay(link: Link | None, header: pb.Header) -> None:
    if link is not None:
        copy = pb.Header()
        copy.CopyFrom(header)  # a link writes its own numbers into what it sends
        link.send(copy)
