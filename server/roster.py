"""The roster of the federation: nodes that are here, with their profiles, and nodes that cannot take part.

Asks nodes for their profiles and measurements. A profile is taken whenever it comes. Once enough nodes are here, they wait for
the others only a little, and never again for one that let them wait in vain. A node whose refusal nothing in the run can change
(`is_final` of its code) is not asked again until it has left and joined anew. Knows nothing about rounds, plans and adapters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass

from flwr.app import ConfigRecord, MessageType, RecordDict

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import Mismatch, ProtocolError, RunFailed, exit_code_of, is_final
from edgelam_fl.names import folded, why_no_name
from edgelam_fl.plan.layout import who_may_host
from edgelam_fl.telemetry.events import LayerSeconds, LinkMeasured, NodeJoined, NodeRefused
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BEHIND
from server.exchange import Addressee, Exchange, Missing, Request, answer_of, is_of_lost_message
from server.membership import OwnerOf
from server.profiles import read_profile
from server.run_folder import RunFolder
from server.schedule import unfit

_LINK = ("link_up_bps", "link_down_bps", "round_trip_s")


@dataclass(frozen=True, slots=True)
class _Question:
    """A node that was asked for its profile and has not answered yet."""

    peer: Addressee
    asked: float  # by the server's clock, s


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A node that is out of the run until it joins anew."""

    name: str
    reason: str
    code: str
    role: int  # as of its profile; 0: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class _Count:
    """Who can take part, and who never can."""

    devices: int
    hosts: int
    devices_out: list[_Refusal]
    hosts_out: list[_Refusal]

    def is_short(self, config: RunConfig, patient: bool) -> bool:
        """Returns whether more nodes are waited for; `patient`: for all that are expected, but for those that are out."""
        federation, hosts = config.federation, config.split.least_hosts
        devices = max(federation.min_nodes, federation.expect_nodes - self._named_out() if patient else 0)
        wanted = max(hosts, hosts * config.split.sites - len(self.hosts_out)) if patient else hosts
        return self.devices < devices or self.hosts < wanted

    def are_all_heard(self, expected: int) -> bool:
        """Returns whether as many devices as are expected can take part or are out; `expected`: 0: any number."""
        return 0 < expected <= self.devices + self._named_out()

    def _named_out(self) -> int:
        """Counts the nodes that are out and sure to be devices."""
        return sum(one.role == pb.DEVICE for one in self.devices_out)


class Roster:
    """Profiles of the nodes that can take part, by name, and the problems of those that cannot."""

    def __init__(
        self,
        exchange: Exchange,
        folder: RunFolder,
        request: pb.ProfileRequest,
        patience_s: float = 0.0,
        owner_of: OwnerOf | None = None,
        leakage_key: str = "",
        codecs: Collection[str] = (),
    ) -> None:
        """Starts empty. `patience_s`: the time for an answer to `request`, if longer than the exchange's own limit for
        queries: a small board needs minutes to start Python. `owner_of`: None: no node has a key, and the first to give a
        name owns it. `leakage_key`: of the run's model, to know what hosts can read. `codecs`: those that every node has to know.
        """
        self.profiles: dict[str, pb.Profile] = {}
        self.problems: dict[str, str] = {}
        self._exchange, self._folder, self._request = exchange, folder, request
        self._limit_s = max(exchange.timing.query_s, patience_s)
        self._owner_of, self._leakage_key, self._codecs = owner_of, leakage_key, codecs
        self._ids: dict[str, int] = {}  # Flower's node ids, by name
        self._spellings: dict[str, str] = {}  # of the names that were here, by their folded form
        self._known: set[int] = set()  # asked at least once
        self._lost: set[int] = set()  # out of the rounds, and asked again when a round starts
        self._final: dict[int, _Refusal] = {}
        self._gone: set[str] = set()  # were here in this run, and may come back
        self._tardy: set[int] = set()  # the others have waited for their answer once, in vain
        self._open: dict[str, _Question] = {}  # by Flower's message ids
        self._has_waited = False  # for all expected nodes, once

    def devices(self) -> list[str]:
        """Returns the names of the devices, sorted."""
        return sorted(name for name, profile in self.profiles.items() if profile.role == pb.DEVICE)

    def edges(self) -> list[pb.Profile]:
        """Returns the edge servers, by name."""
        found = (p for p in self.profiles.values() if p.role == pb.EDGE)
        return sorted(found, key=lambda profile: profile.name)

    def gather(self, config: RunConfig, at_start: bool) -> None:
        """Waits for `min_nodes` devices and the hosts of one site; at the start until the deadline for all expected nodes.

        Raises RunFailed with a list of the nodes that are here: at the deadline, or earlier if all have refused for good.
        """
        timing = self._exchange.timing
        began = quiet_since = timing.now()
        end, enough_since = began + config.federation.join_deadline_s, math.inf
        short = True  # lost nodes are asked when a round starts, and again while too few nodes are here
        while True:
            news, now = self.refresh(ask_lost=short), timing.now()
            quiet_since = now if news else quiet_since
            count = self._count(config)
            short = count.is_short(config, patient=at_start and not self._has_waited and now <= end)
            enough_since = math.inf if short else min(enough_since, now)
            if not short and not news and not self._waits_for_others(enough_since, enough_since - began):
                self._has_waited = True
                return
            if short and not news:
                self._check_hope(config, count, now - quiet_since)
                if now > end and not any(q.asked <= end for q in self._open.values()):
                    raise self._too_few(config)
            if not news:
                timing.sleep(timing.poll_s if short else timing.first_poll_s)

    def _count(self, config: RunConfig) -> _Count:
        """Counts who is here and who is out: nodes that have refused for good, and devices that the run file excludes."""
        unfit = {name: reason for name in self.devices() if (reason := self._unfit(config, name))}
        return _Count(
            devices=len(self.devices()) - len(unfit),
            hosts=len(who_may_host(config, self.profiles.values())),
            devices_out=[r for r in self._final.values() if r.role != pb.EDGE]
            + [_Refusal(name, reason, "", pb.DEVICE) for name, reason in unfit.items()],
            hosts_out=[r for r in self._final.values() if r.role == pb.EDGE or config.split.host_on == "any"],
        )

    def _check_hope(self, config: RunConfig, count: _Count, quiet_s: float) -> None:
        """Raises RunFailed if too few are left and nobody is to be waited for.

        A node may still be on its way, and is given a little time, unless as many devices have been heard as are expected. One
        that has left may come back.
        """
        if self._open or self._lost or self._gone:
            return
        has_settled = quiet_s >= self._exchange.timing.settle_s
        all_heard = count.are_all_heard(config.federation.expect_nodes)
        if count.devices < config.federation.min_nodes and count.devices_out:
            if all_heard:
                raise _nobody_left("too few devices are" if count.devices else "no device is", count.devices_out)
            if has_settled and not count.devices:
                raise _nobody_left("no device is", count.devices_out)
        if has_settled:
            self._check_hosts(config, count)

    def _check_hosts(self, config: RunConfig, count: _Count) -> None:
        """Raises RunFailed if all hosts that came have refused for good."""
        if config.split.least_hosts and not count.hosts and count.hosts_out:
            raise _nobody_left("no host is", count.hosts_out)

    def revisit(self) -> None:
        """Asks new and lost nodes, and waits a little for their answers."""
        timing = self._exchange.timing
        began = timing.now()
        self.refresh(ask_lost=True)
        while self._waits_for_others(began, 0.0):
            timing.sleep(timing.first_poll_s)
            self.refresh()

    def _waits_for_others(self, since: float, took_s: float) -> bool:
        """Returns whether to wait on for profiles. Enough nodes are here `since` then, and their profiles took `took_s`."""
        timing = self._exchange.timing
        awaited = {question.peer.node_id for question in self._open.values()} - self._tardy
        if timing.now() - since < max(timing.settle_s, took_s):
            return bool(awaited)
        self._tardy |= awaited
        return False

    def await_hosts(self, config: RunConfig) -> None:
        """Waits until the hosts of one site are here, or until the deadline."""
        timing = self._exchange.timing
        end = timing.now() + config.federation.join_deadline_s
        quiet_since = timing.now()
        while len(who_may_host(config, self.profiles.values())) < config.split.least_hosts and timing.now() < end:
            if self.refresh():
                quiet_since = timing.now()
                continue
            waits = self._open or self._lost or self._gone
            if not waits and timing.now() - quiet_since >= timing.settle_s:
                self._check_hosts(config, self._count(config))
            timing.sleep(timing.poll_s)

    def refresh(self, ask_lost: bool = False) -> bool:
        """Asks new nodes for their profiles, takes what has been answered, and forgets nodes that left; never waits.

        Returns whether anything changed.
        """
        present, left = self._exchange.present(), self._exchange.left()
        for name, node_id in list(self._ids.items()):
            if node_id not in present:
                self._forget(name, "left the federation")
        for nodes in (self._lost, self._known, self._tardy):
            nodes &= present
        for node_id in self._final.keys() & (left | (self._final.keys() - present)):
            del self._final[node_id]  # if it is back, it may have been mended
            self._known.discard(node_id)
        new, before = present - self._known, set(self.profiles)
        asked_already = {question.peer.node_id for question in self._open.values()}
        self._ask(new | (self._lost - asked_already if ask_lost else set()))
        self._take_answers(present)
        return bool(new) or set(self.profiles) != before

    def _ask(self, node_ids: Iterable[int]) -> None:
        content = RecordDict({"query": ConfigRecord({"request": self._request.SerializeToString()})})
        requests = [Request(self._name_of(node_id), node_id, MessageType.QUERY, content) for node_id in node_ids]
        for message_id, peer in self._exchange.send(requests).items() if requests else ():
            self._open[message_id] = _Question(peer, self._exchange.timing.now())
            self._known.add(peer.node_id)
            self._lost.add(peer.node_id)  # until it turns out to be able to take part

    def _take_answers(self, present: Set[int]) -> None:
        """Enrols or refuses the nodes that have answered, and gives up those that have left or are too late."""
        arrived = self._exchange.arrived(self._open) if self._open else {}
        while arrived:
            message_id, message = arrived.popitem()
            peer = self._open.pop(message_id).peer
            if is_of_lost_message(message):
                self._known.discard(peer.node_id)  # its SuperNode was started again, and is asked as a new one
                continue
            self._tardy.discard(peer.node_id)
            answer = answer_of(peer.name, message)
            try:
                if isinstance(answer, Missing):
                    self._refuse(peer.node_id, peer.name, answer.reason, answer.code)
                else:
                    self._enrol(peer.node_id, read_profile(answer.content))
            except ProtocolError as error:
                self._refuse(peer.node_id, peer.name, str(error))
        now = self._exchange.timing.now()
        for message_id, question in list(self._open.items()):
            left = question.peer.node_id not in present
            if left or now - question.asked >= self._limit_s:
                del self._open[message_id]
                reason = "left the federation" if left else f"no reply within {self._limit_s:.0f} s"
                self._refuse(question.peer.node_id, question.peer.name, reason)

    def measure_links(self, names: Iterable[str]) -> None:
        """Has nodes measure their links to the hub, and updates their profiles. A node without an answer keeps its values."""
        request = pb.ProfileRequest(
            protocol_version=PROTOCOL_VERSION,
            task=self._request.task,
            hub_port=self._request.hub_port,
            measure_link=True,
        )
        content = RecordDict({"query": ConfigRecord({"request": request.SerializeToString()})})
        requests = [Request(name, self._ids[name], MessageType.QUERY, content) for name in names]
        for answer in self._exchange.replies(requests, self._exchange.timing.query_s):
            if isinstance(answer, Missing) or answer.name not in self.profiles:
                continue
            try:
                link = _link(read_profile(answer.content))
            except ProtocolError:
                continue
            if all(link.get(key, 0.0) > 0 for key in _LINK):
                for key, value in link.items():
                    setattr(self.profiles[answer.name], key, value)
                self._folder.emit(LinkMeasured(node=answer.name, **link))

    def request(self, name: str, kind: str, content: RecordDict) -> Request:
        """Addresses a message to a node that is here."""
        return Request(name, self._ids[name], kind, content)

    def delivered(self, name: str) -> None:
        """Forgets the problem of a node that has delivered."""
        self.problems.pop(name, None)

    def failed(self, name: str, reason: str, code: str = "", *, silent: bool, tardy: bool = False) -> None:
        """Notes why a node did not deliver. `code`: kind of the reason; with a final one the node is in no plan until it joins anew.

        A `silent` one is in none until it answers a query: others would wait for it. For the answer of a `tardy` one nobody
        waits, as they have waited for it.
        """
        self.problems[name] = reason
        if is_final(code):
            profile = self.profiles.pop(name, pb.Profile())
            self._end(self._ids[name], _Refusal(name, reason, code, profile.role))
        elif silent:
            self.lose(name)
            self._tardy |= {self._ids[name]} if tardy else set()

    def lose(self, name: str) -> None:
        """Takes a node out of the coming plans until it answers a query."""
        self.profiles.pop(name, None)
        self._lost.add(self._ids[name])

    def _name_of(self, node_id: int) -> str:
        """Returns a node's name: by its profile, else by its key; words with its number if neither is known yet."""
        known = next((name for name, known in self._ids.items() if known == node_id), "")
        owner = self._owner_of(node_id) if self._owner_of is not None and not known else None
        return known or (owner.name if owner is not None else _nameless(node_id))

    def _enrol(self, node_id: int, profile: pb.Profile) -> None:
        problem, code = profile.problem, profile.code
        if profile.protocol_version != PROTOCOL_VERSION:
            problem = f"speaks protocol version {profile.protocol_version}, this server {PROTOCOL_VERSION}: install the same edgelam-fl"
            code = Mismatch.code
        elif not problem and (not_its_own := self._why_not_itself(node_id, profile)):
            problem = not_its_own
        elif not problem and (unknown := [codec for codec in self._codecs if codec not in profile.codecs]):
            problem = f"does not know the codec {unknown[0]!r}, which the run asks for ([wire]); it knows {', '.join(profile.codecs)}"
            code = Mismatch.code
        elif not problem and profile.address.startswith(BEHIND) and not self._request.hub_port:
            problem = "can be reached by a relay alone (--listen relay), and this server has none: start it with `edgelam server`"
        if problem:
            name = self._name_of(node_id) if why_no_name(profile.name) else profile.name
            self._refuse(node_id, name, problem, code, profile.role)
            return
        self._lost.discard(node_id)
        self._gone.discard(profile.name)
        self._spellings[folded(profile.name)] = profile.name
        self._ids[profile.name] = node_id
        self.profiles[profile.name] = profile
        self.problems.pop(profile.name, None)
        joined = NodeJoined(
            node=profile.name, role=pb.Role.Name(profile.role).lower(), address=profile.address,
            examples=profile.examples, held_out=profile.held_out,
            bad=profile.data.bad, skipped=profile.data.skipped, cut=profile.data.cut, cut_answers=profile.data.cut_answers,
            unread_fields=profile.data.unread, unmeasured=profile.data.unmeasured,
            memory_available_bytes=profile.memory_available_bytes, cpu_threads=profile.cpu_threads, tags=tuple(profile.tags),
            chip=profile.chip,
            base_seconds=dict(profile.base_seconds), idle_bytes=profile.idle_bytes, layer_times=_layer_times(profile),
            **_link(profile),
        )  # fmt: skip
        self._folder.emit(joined)

    def _why_not_itself(self, node_id: int, profile: pb.Profile) -> str:
        """Returns why a node cannot have a name that is well formed, or its role; empty if it can."""
        name = profile.name
        if self._owner_of is not None:
            owner = self._owner_of(node_id)
            if owner is None:
                return "its key belongs to no member of this federation; invite it: edgelam invite NAME, on the server"
            if owner.name != name:
                return f"calls itself {name}, and its key belongs to {owner.name}; start it with the state folder and name that it joined with"
            if owner.role != profile.role:
                was, wants = _role(owner.role), _role(profile.role)
                return f"joined as {was} and takes part as {wants}; start it as {was}, or revoke it and invite it as {wants}"
        known = self._name_of(node_id)
        if known not in (name, _nameless(node_id)):
            return f"was {known} a moment ago and calls itself {name} now; a node has one name"
        if name in self.profiles and self._ids[name] != node_id:
            return "another node has this name already; give each its own with --name"
        spelling = self._spellings.get(folded(name), name)
        if spelling != name:
            return f"this run knows {spelling}, and names that differ in case alone are one name; choose another with --name"
        return ""

    def _refuse(self, node_id: int, name: str, reason: str, code: str = "", role: int = 0) -> None:
        if self.problems.get(name) != reason:  # a lost node is asked again and again
            has_another = name in self.profiles and self._ids[name] != node_id  # who is here, and is not refused
            self._folder.emit(NodeRefused(node=f"a second {name}" if has_another else name, reason=reason, code=code))
        self.problems[name] = reason
        if is_final(code):
            owner = self._owner_of(node_id) if self._owner_of is not None else None
            self._end(node_id, _Refusal(name, reason, code, role or (owner.role if owner is not None else 0)))

    def _end(self, node_id: int, refusal: _Refusal) -> None:
        """Takes a node out of the run until it has left and joined anew."""
        self._final[node_id] = refusal
        self._gone.discard(refusal.name)
        self._lost.discard(node_id)

    def _forget(self, name: str, reason: str) -> None:
        self._gone.add(name)
        self.profiles.pop(name, None)
        self._ids.pop(name, None)
        self.problems[name] = reason

    def _unfit(self, config: RunConfig, name: str) -> str:
        return unfit(config, self.profiles[name], self._leakage_key)

    def _too_few(self, config: RunConfig) -> RunFailed:
        federation, devices, hosts = config.federation, self.devices(), config.split.least_hosts
        reasons = {name: self._unfit(config, name) for name in devices} | self.problems
        problems = "".join(f"; {name}: {reason}" for name, reason in sorted(reasons.items()) if reason)
        any_device = " or devices that listen" if config.split.host_on == "any" else ""
        wanted_hosts = f" and {human_count(hosts, 'edge server')}{any_device} (split.hosts)" if hosts else ""
        return RunFailed(
            f"after {federation.join_deadline_s:.0f} s {human_count(len(devices), 'device')} ({', '.join(devices) or 'none'}) "
            f"and {human_count(len(self.edges()), 'edge server')} are here; the run needs at least "
            f"{human_count(federation.min_nodes, 'device')}{wanted_hosts} "
            f"(federation.min_nodes, federation.join_deadline_s){problems}"
        )


def _nobody_left(who: str, out: list[_Refusal]) -> RunFailed:
    reasons = "".join(f"; {one.name}: {one.reason}" for one in sorted(out, key=lambda one: one.name))
    return RunFailed(
        f"{who} left that can take part, and nothing within this run can change that{reasons}",
        exit_code_of([one.code for one in out]),
    )


def _nameless(node_id: int) -> str:
    return f"a node that has not said its name (number {node_id})"


def _role(role: pb.Role) -> str:
    return "a device (with --data)" if role == pb.DEVICE else "an edge server (--role host, without --data)"


def _layer_times(profile: pb.Profile) -> tuple[LayerSeconds, ...]:
    return tuple(LayerSeconds(tokens=time.tokens, seconds=dict(time.seconds)) for time in profile.layer_times)


def _link(profile: pb.Profile) -> dict[str, float]:
    return {key: getattr(profile, key) for key in _LINK}
