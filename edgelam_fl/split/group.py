"""The devices that a host serves in a round, and the links to the nodes before and after it on their routes.

Lets links in, passes decisions of the coordinator on, notes who is lost and why. Knows nothing about layers or steps;
`split.host` computes, `wire.link` brings the frames.

Hosts form a chain; a device reaches the first by its entry link and the last by its exit link. On every route, `previous` is
the host before this one, or the device's front at the first host; `next` is the host after it, or the device's back at the
last host. The last host coordinates: its decisions go to the devices, and along their routes to the hosts before it.
"""

from __future__ import annotations

import hmac
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from edgelam_fl.errors import EdgelamError, PeerLost, ProtocolError
from edgelam_fl.plan.reading import codecs_of, job_id
from edgelam_fl.split.fronts import KeptFronts
from edgelam_fl.split.inbox import Inbox, Out
from edgelam_fl.split.member import Member
from edgelam_fl.split.route import link_events, most_bytes
from edgelam_fl.telemetry.events import EmitInJob, LinkLost
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codecs import CODECS
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Link
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.terms import LinkTerms, MakeTerms, OnSent, link_terms

RETRY_MS = 200  # until a node that is not let in yet dials again

# route, hop number, counters, terms, inbox of the host's part -> an open entry link to that hop
DialNext = Callable[[pb.Route, int, ByteCounters, MakeTerms, Inbox], Link]


class Group:
    """The members of a host's group, their links, and the inbox behind all of them."""

    def __init__(
        self,
        plan: pb.Plan,
        hidden_size: int,
        wire: torch.dtype,
        window: int,
        dial: DialNext,
        emit: EmitInJob,
        fronts: KeptFronts | None = None,
    ) -> None:
        """Prepares a group in which no link is open yet.

        `wire`: what hidden states travel in. `window`: the micro-batches of one device that this host has memory for.
        `dial`: opens a link to the next host. `fronts`: keeps the states of devices' fronts here; None: they come every time.
        """
        self.plan, self.window, self.emit, self.fronts = plan, window, emit, fronts
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
        """Answers a handshake, on any thread; opens the link before READY leaves."""
        member = self.members.get(hello.device_index)
        if member is None or not hmac.compare_digest(member.route.token, hello.route_token):
            return pb.Refuse(
                reason=f"node {hello.node!r} has no route here in {job_id(self.plan)}, or a wrong route token"
            )
        entry = hello.link == pb.ENTRY
        caller = self._dialler(member, entry)
        if hello.node != caller:
            return pb.Refuse(reason=f"this route's link is dialled by {caller!r}, not by {hello.node!r}")
        refusal = self._refusal(hello)
        if refusal:
            return pb.Refuse(reason=refusal)
        side = "entry" if entry else "exit"
        with self._door:
            older = member.previous if entry else member.next
            if older is not None or member.gone or hello.resumes:
                return _again(member, older, link, f"{side} link of {hello.node!r}")
            if entry and not self.coordinates and not member.window:
                return pb.NotReady(retry_ms=RETRY_MS)  # the window of the next link, not open yet, bounds this one's
            granted = self._granted(hello.window, *([member.window] if entry and not self.coordinates else []))
            activations, gradients = codecs_of(self.plan)
            ready = pb.Ready(
                version=PROTOCOL_VERSION, window=granted, activation_codec=activations, gradient_codec=gradients,
                job_token=hello.device_index + 1,
                front_cache=self.fronts.number if entry and self.fronts is not None else b"",
            )  # fmt: skip
            to_device = not entry or self.position == 0  # else within the chain, where nothing is paced
            pace = self._pace_to(member) if to_device else None
            link.open(self._make_terms()(f"{side} {member.route.device}", self.counters, ready, pace=pace))
            self._owners[id(link)] = member
            if entry:
                member.previous = link
            else:
                member.next, member.window = link, self._granted(hello.window)
        return ready

    def _dialler(self, member: Member, entry: bool) -> str:
        """Returns the node that dials a link of a route here: the device, or the host before for an entry in the chain."""
        return member.route.hops[self.position - 1].node if entry and self.position else member.route.device

    def _refusal(self, hello: pb.Hello) -> str:
        """Returns why a member of the group cannot be let in; empty if it can."""
        if hello.model_digest != self.plan.model.digest:
            own = self.plan.model.digest
            return f"node {hello.node!r} has another model ({hello.model_digest[:12]}), the plan's is {own[:12]}"
        for codec in codecs_of(self.plan):
            if codec not in hello.codecs or codec not in CODECS:
                return f"the plan asks for codec {codec!r}; node {hello.node!r} knows {list(hello.codecs)}, and host {self.plan.node} {list(CODECS)}"
        if hello.link != pb.ENTRY and not self.coordinates:
            return f"node {hello.node!r} dials its exit here, and this is not its route's last host"
        if self.window < 1:
            return (
                f"host {self.plan.node} has no memory for a micro-batch of each of {len(self.members)} devices; smaller "
                f"ones (federation.batch_size, split.micro_batches, task.max_tokens) or split.checkpointing would help"
            )
        return ""

    def _make_terms(self) -> partial[LinkTerms]:
        on_suspended, on_resumed = link_events(self.emit)
        return partial(
            link_terms, most_bytes=most_bytes(self.plan, self.hidden_size), silent_s=self.plan.deadlines.silent_s,
            reconnect_s=self.plan.deadlines.reconnect_s, on_frame=self.inbox.on_frame, on_lost=self.inbox.on_lost,
            on_sent=self.on_sent, on_suspended=on_suspended, on_resumed=on_resumed,
        )  # fmt: skip

    def _granted(self, *windows: int) -> int:
        return min(self.window, self.plan.window, *(window for window in windows if window))

    def _pace_to(self, member: Member) -> Pace | None:
        """Returns the one pace of all that goes from here to a device; its first and its last host take half each."""
        share_bps = member.route.share_bps
        if not share_bps:
            return None
        ends = 1 if self.chain_length == 1 else 2
        return self._paces.setdefault(member.index, Pace(share_bps / 8 / ends))

    def dial_next(self) -> None:
        """Opens every route's link to the next host; dismisses a device whose link cannot be opened."""
        for member in self.members.values():
            try:
                link = self._dial(member.route, self.position + 1, self.counters, self._make_terms(), self.inbox)
            except EdgelamError as error:
                self.dismiss(member, str(error))
                continue
            with self._door:
                self._owners[id(link)] = member
                member.next, member.window = link, link.terms.window

    def gather(self, take: Callable[[], object]) -> None:
        """Waits until all devices are here or the deadline has passed. `take` handles what arrives meanwhile.

        Raises PeerLost with fewer than `min_devices` devices.
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
        """Ends all links; sends the reason over those that are open."""
        for member in self.members.values():
            for link in (member.previous, member.next):
                if link is not None:
                    if not member.done:
                        link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                    link.close()

    # ---------------------------------------------------------------- who is here

    def owner(self, link: Link) -> Member:
        """Returns the device whose route a link belongs to."""
        return self._owners[id(link)]

    def active(self) -> list[Member]:
        """Lists the devices that are here and not done."""
        return [member for member in self.members.values() if member.active]

    def check_enough(self) -> None:
        """Raises PeerLost if every device was lost."""
        if not any(member.done for member in self.members.values()):
            raise PeerLost(
                "every device was lost: " + "; ".join(f"{m.route.device}: {m.gone}" for m in self.members.values())
            )

    @contextmanager
    def working_for(self, member: Member, link: Link | None) -> Iterator[None]:
        """Loses the device if the block fails, which works on one of its frames: nobody else pays for what it sent.

        `link`: over which the frame came. The full error goes to this node's own log alone.
        """
        try:
            yield
        except ProtocolError as error:
            self.lose(member, link, f"broke the protocol: {error}")
        except Exception as error:  # noqa: BLE001 - whatever else its numbers made fail
            traceback.print_exc()
            self.lose(member, link, f"a frame that host {self.plan.node} cannot work on: {type(error).__name__}")

    def lose(self, member: Member, link: Link | None, reason: str) -> None:
        """Handles a failed link.

        The coordinator dismisses the device. Another host stops its forward passes, passes the reason on and waits:
        gradients of a step that the coordinator has counted are still on their way.
        """
        if self.coordinates or link is member.next:
            self.dismiss(member, reason)
        elif not member.leaving and not member.gone:
            self._note_loss(member, reason)
            cancel = pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason))
            relay(member.previous, cancel)
            relay(member.next, cancel)
            if member.previous is not None:
                member.previous.close()

    def put_out(self, out: Out) -> None:
        """Goes on without a device that the server has taken out of the job, if it belongs here and is not done."""
        with self._door:
            for member in self.members.values():
                if member.route.device == out.device and not member.done:
                    if member.present:
                        self.lose(member, member.previous, out.reason)
                    else:
                        self.dismiss(member, out.reason)

    def _note_loss(self, member: Member, reason: str) -> None:
        if not member.leaving:
            member.leaving = reason
            member.forwards.clear()
            self.emit(LinkLost(link=member.route.device, reason=reason))

    def dismiss(self, member: Member, reason: str) -> None:
        """Takes a device out of the round: drops its unfinished micro-batches, keeps its earlier steps."""
        if member.gone:
            return
        self._note_loss(member, reason)
        member.gone = member.leaving
        member.caches.clear()
        for link in (member.previous, member.next):
            if link is not None and not link.closed:
                link.send(pb.Header(kind=pb.CANCEL, cancel=pb.Cancel(reason=reason)))
                link.close()

    # ---------------------------------------------------------------- along the routes

    def done(self, member: Member, link: Link | None, header: pb.Header) -> None:
        """Notes that a device has finished, and passes DONE on to the other hosts of its route.

        The device says it on both of its links, so that whichever ends first does not look like a loss.
        """
        member.done = not member.gone
        if link is member.previous and not self.coordinates:
            self.send_next(member, header)
        elif link is member.next:
            self.send_previous(member, header)

    def decide(
        self,
        members: Sequence[Member],
        header: pb.Header,
        for_device: Callable[[pb.Header, Member], pb.Header] = lambda header, member: header,
    ) -> None:
        """Sends a decision of the coordinator to devices, and along their routes to the hosts before.

        `for_device`: returns what a device gets of it.
        """
        for member in members:
            if member.active:
                self.send_next(member, for_device(header, member))
                self.send_previous(member, header)

    def send_previous(self, member: Member, header: pb.Header) -> None:
        """Sends a control frame to the host before, if there is one: a device listens to the coordinator at its exit."""
        if self.position > 0:
            relay(member.previous, header)

    def send_next(self, member: Member, header: pb.Header) -> None:
        """Sends a control frame to the host after, or from the last host to the device."""
        relay(member.next, header)

    def send_next_over_any(self, header: pb.Header) -> None:
        """Sends a control frame to the host after, on the link of any device."""
        member = next((m for m in self.active() if m.next is not None), None)
        if member is not None:
            relay(member.next, header)


def _again(member: Member, older: Link | None, newcomer: Link, name: str) -> pb.Ready | pb.Refuse:
    """Answers a dialler that comes to a link which was, or should have been, opened before: `older`; None: it was not."""
    ready = older.continue_on(newcomer) if older is not None and not member.gone else None
    if ready is not None:
        return ready
    if member.gone:
        return pb.Refuse(reason=f"{member.route.device} is out of the round: {member.gone}")
    return pb.Refuse(reason=f"the {name} was opened before" if older is not None else f"no {name} is open here")


def relay(link: Link | None, header: pb.Header) -> None:
    """Sends a copy of a control frame: a link writes numbers of its own into what it sends. None: sends nothing."""
    if link is not None:
        copy = pb.Header()
        copy.CopyFrom(header)
        link.send(copy)
