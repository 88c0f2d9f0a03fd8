"""Generates over a route: hidden states of new tokens pass through the hosts, each of which caches the earlier tokens.

The device holds embedding, first and last layers: it alone sees text, and picks the tokens. Hosts see hidden states, as
in training, and know no tokens. Neighbours: `split.group` holds a host's links, `serving.generate` the loop that asks for
the next token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.model.chip import off
from edgelam_fl.model.stage import Stage
from edgelam_fl.split.cut import CutDefence
from edgelam_fl.split.group import Group, relay
from edgelam_fl.split.inbox import Lost, Out
from edgelam_fl.split.member import Member
from edgelam_fl.split.route import Route
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link

_SESSIONS = 4  # per device at a time


class HostSessions:
    """The host's end: keeps one KV cache per session, until every device is done."""

    def __init__(self, plan: pb.Plan, stage: Stage, group: Group) -> None:
        self.plan, self.stage, self.group = plan, stage, group

    def run(self) -> None:
        """Serves the devices of the plan until all are done. Raises PeerLost if every device was lost."""
        if not self.group.coordinates:
            self.group.dial_next()
        self.group.gather(lambda: self._take(0.05))
        while self.group.active():
            self._take(self.plan.deadlines.round_s)
        self.group.check_enough()

    def _take(self, wait_s: float) -> None:
        arrival = self.group.inbox.get(wait_s)
        if arrival is None:
            return
        if isinstance(arrival, Out):
            self.group.put_out(arrival)
            return
        assert isinstance(arrival, tuple)  # nobody computes beside this thread
        link, item = arrival
        member = self.group.owner(link)
        if not isinstance(item, Lost):
            with self.group.working_for(member, link):
                self._read(member, link, item)
        elif not member.done:
            self.group.lose(member, link, f"link {link.name}: {item.reason}")

    def _read(self, member: Member, link: Link, frame: Frame) -> None:
        header = frame.header
        if header.kind == pb.DONE:
            self.group.done(member, link, header)
        elif header.kind == pb.CANCEL:
            self.group.lose(member, member.previous, header.cancel.reason)
        elif header.kind == pb.KV_STEP and link is member.previous:
            self._step(member, header, frame.tensor)
        elif header.kind == pb.KV_DROP and link is member.previous:
            member.caches.pop(header.kv_drop.session, None)
            relay(member.next if not self.group.coordinates else None, header)

    @torch.no_grad()
    def _step(self, member: Member, header: pb.Header, inputs: torch.Tensor | None) -> None:
        position, length = self._checked(member, header, inputs)
        assert inputs is not None
        session = header.kv_step.session
        if position == 0:
            if len(member.caches) >= _SESSIONS and session not in member.caches:
                raise ProtocolError(f"more than {_SESSIONS} generation sessions at a time")
            member.caches[session] = (0, self.stage.new_cache())
        cache = member.caches[session][1]
        hidden = off(self.stage(inputs.to(self.stage.dtype), [length], layers=member.layers, cache=cache))
        member.caches[session] = (position + length, cache)
        if self.group.coordinates and member.route.back_first >= self.plan.model.num_layers:
            hidden = hidden[:, -1:]  # no layer of the device attends to the others: the next token is all it asks for
        answer = pb.Header(kind=pb.KV_STEP, kv_step=header.kv_step, device_index=header.device_index)
        assert member.next is not None
        member.next.send(answer, hidden.to(self.group.wire).contiguous())

    def _checked(self, member: Member, header: pb.Header, inputs: torch.Tensor | None) -> tuple[int, int]:
        """Returns (position, length). Raises ProtocolError if they do not fit the tensor and the session."""
        if not header.HasField("kv_step") or inputs is None:
            raise ProtocolError("a KV_STEP without position, length or hidden states")
        position, length = header.kv_step.position, header.kv_step.length
        known = member.caches.get(header.kv_step.session, (0, None))[0]
        if tuple(inputs.shape) != (1, length, self.group.hidden_size) or inputs.dtype != self.group.wire or not length:
            raise ProtocolError(f"hidden states {list(inputs.shape)} of {inputs.dtype} for {length} new tokens")
        if position not in (0, known) or position + length > self.plan.task.max_tokens:
            raise ProtocolError(
                f"tokens {position} to {position + length} of a session that holds {known}, at most {self.plan.task.max_tokens}"
            )
        return position, length


class RouteSession:
    """The device's end: takes token ids, gives the next token's logits."""

    def __init__(
        self,
        stages: list[Stage],
        adapter: Mapping[str, np.ndarray],
        route: Route,
        wire: torch.dtype,
        patience_s: float,
        cut: pb.Cut,
    ) -> None:
        self.front, self.back, self.route, self.wire, self._patience_s = stages[0], stages[-1], route, wire, patience_s
        for stage in (self.front, self.back):
            stage.load_adapter(dict(adapter))
        self._cut = CutDefence(cut, self.front)
        self._session, self._position = 0, 0
        self._caches = self.front.new_cache(), self.back.new_cache()

    def reset(self) -> None:
        """Begins a new text; the hosts drop their cache of the old one."""
        assert self.route.entry is not None
        if self._position:
            self.route.entry.send(pb.Header(kind=pb.KV_DROP, kv_drop=pb.KvDrop(session=self._session)))
        self._session, self._position = self._session + 1, 0
        self._caches = self.front.new_cache(), self.back.new_cache()

    @torch.no_grad()
    def step(self, ids: list[int]) -> torch.Tensor:
        """Returns the logits [V] of the token after `ids`, which continue the text so far. Raises PeerLost."""
        assert self.route.entry is not None
        front_cache, back_cache = self._caches
        new = pb.KvStep(session=self._session, position=self._position, length=len(ids))
        states = off(self.front(torch.tensor([ids]), [len(ids)], cache=front_cache))
        hidden = self._cut.states(states, [len(ids)], begins=not self._position).to(self.wire)
        self.route.entry.send(pb.Header(kind=pb.KV_STEP, kv_step=new), hidden.contiguous())
        answer = self._answer()
        self._position += len(ids)
        logits = self.back(answer.to(self.back.dtype), [answer.shape[1]], cache=back_cache)
        return off(logits[0, -1])

    def _answer(self) -> torch.Tensor:
        while True:
            frame = self.route.receive(self._patience_s, "the answer to a token")
            of_session = frame.header.kind == pb.KV_STEP and frame.header.kv_step.session == self._session
            if of_session and frame.tensor is not None:
                return frame.tensor

    def finish(self) -> None:
        """Ends the conversation: tells the hosts and closes the links."""
        for link in (self.route.exit, self.route.entry):
            if link is not None:
                link.send(pb.Header(kind=pb.DONE, done=pb.Done()))
                link.close()
