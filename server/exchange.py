"""The federation's nodes as the ServerApp sees them: who is here, and one message to each with a deadline.

Flower's own `send_and_receive` waits for all until its time is up; here a node that Flower no longer lists is given up at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.plan.layout import who_may_host
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BEHIND
from server.run_folder import RunFolder
from server.schedule import unfit

_POLL_S = 0.5
_FIRST_POLL_S = 0.05  # a simulated node answers at once
_QUERY_S = 90.0
_LINK = ("link_up_bps", "link_down_bps", "round_trip_s")


@dataclass
class Ending:
    """A site whose parts end together: once a host of it has replied, or each of its members, the others have `limit_s` more.

    Flower goes on listing a SuperNode that lost a message, as it does where the ClientApp ended before it had fetched it, and
    would be waited for until the round's deadline.
    """

    hosts: frozenset[str]
    members: frozenset[str]
    limit_s: float
    _since: float = math.inf

    def late(self, silent: Set[str]) -> Set[str]:
        """Those of the silent nodes whose time is up."""
        over = not self.hosts <= silent or not self.members & silent
        self._since = min(self._since, time.monotonic()) if over else math.inf
        return (self.hosts | self.members) & silent if time.monotonic() - self._since > self.limit_s else frozenset()


@dataclass
class Nodes:
    """Profiles of the nodes that can take part, by name."""

    grid: Grid
    folder: RunFolder
    request: pb.ProfileRequest
    patience_s: float = 0.0  # for an answer to a query, where it is longer: a small board starts Python for minutes
    profiles: dict[str, pb.Profile] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # nodes that are here and cannot take part
    _ids: dict[str, int] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    _lost: set[int] = field(default_factory=set)  # not here, and asked again when a round starts

    def devices(self) -> list[str]:
        return sorted(name for name, profile in self.profiles.items() if profile.role == pb.DEVICE)

    def edges(self) -> list[pb.Profile]:
        """The edge servers, by name."""
        found = (p for p in self.profiles.values() if p.role == pb.EDGE)
        return sorted(found, key=lambda profile: profile.name)

    def gather(self, config: RunConfig, at_start: bool) -> None:
        """Waits for `min_nodes` devices and the hosts of one site; at the start until the deadline for all that are expected.

        Raises RunFailed with who is here.
        """
        federation = config.federation
        end = time.monotonic() + federation.join_deadline_s
        short = True  # those that were lost are asked when a round starts, and again while too few are here
        while True:
            news = self.refresh(ask_lost=short)
            late = time.monotonic() > end
            patient = at_start and not late
            devices = max(federation.min_nodes, federation.expect_nodes) if patient else federation.min_nodes
            hosts = config.split.least_hosts * (config.split.sites if patient else 1)
            here = len(who_may_host(config, self.profiles.values()))
            fit = [name for name in self.devices() if not unfit(config, self.profiles[name])]
            short = len(fit) < devices or here < hosts
            if not news and not short:
                return
            if late and not news:
                break
            if not news:
                time.sleep(_POLL_S)
        reasons = {name: unfit(config, self.profiles[name]) for name in self.devices()} | self.problems
        problems = "".join(f"; {name}: {reason}" for name, reason in sorted(reasons.items()) if reason)
        any_device = " or devices that listen" if config.split.host_on == "any" else ""
        wanted_hosts = f" and {hosts} edge servers{any_device} (split.hosts)" if hosts else ""
        raise RunFailed(
            f"after {federation.join_deadline_s:.0f} s {len(self.devices())} devices ({', '.join(self.devices()) or 'none'}) and "
            f"{len(self.edges())} edge servers are here; the run needs at least {federation.min_nodes}{wanted_hosts} "
            f"(federation.min_nodes, federation.join_deadline_s){problems}"
        )

    def lose(self, name: str) -> None:
        """It did not deliver: not planned for until it answers a query, or the others would wait for it again."""
        self.profiles.pop(name, None)
        self._lost.add(self._ids[name])

    def refresh(self, ask_lost: bool = False) -> bool:
        """Asks new nodes for their profile, forgets those that left; returns whether anything changed."""
        present = set(self.grid.get_node_ids())
        for name, node_id in list(self._ids.items()):
            if node_id not in present:
                self._forget(name, "left the federation")
        self._lost &= present
        self._known &= present
        fresh = present - self._known | (self._lost if ask_lost else set())
        if not fresh:
            return False
        replies, missing = self._query(fresh, self.request, max(_QUERY_S, self.patience_s))
        before, new = set(self.profiles), fresh - self._known
        self._known |= fresh
        self._lost |= fresh  # those that can take part are taken out again
        for reply in replies.values():
            self._enrol(reply.metadata.src_node_id, pb.Profile.FromString(reply.content["profile"]["profile"]))
        for name, reason in missing.items():
            self._refuse(name, reason)
        return bool(new) or set(self.profiles) != before

    def measure_links(self, names: Iterable[str]) -> None:
        """Has nodes measure their links to the hub anew, and takes that into their profiles. Who does not answer keeps its own."""
        request = pb.ProfileRequest(
            protocol_version=PROTOCOL_VERSION, task=self.request.task, hub_port=self.request.hub_port, measure_link=True
        )
        replies, _ = self._query([self._ids[name] for name in names], request, _QUERY_S)
        for name, reply in sorted(replies.items()):
            link = _link(pb.Profile.FromString(reply.content["profile"]["profile"]))
            if name in self.profiles and all(link.get(key, 0.0) > 0 for key in _LINK):
                for key, value in link.items():
                    setattr(self.profiles[name], key, value)
                self.folder.emit("link_measured", node=name, **link)

    def _query(
        self, node_ids: Iterable[int], request: pb.ProfileRequest, timeout_s: float
    ) -> tuple[dict[str, Message], dict[str, str]]:
        content = RecordDict({"query": ConfigRecord({"request": request.SerializeToString()})})
        messages = [Message(content=content, dst_node_id=n, message_type=MessageType.QUERY) for n in node_ids]
        return self.exchange(messages, timeout_s)

    def name_of(self, reply: Message) -> str:
        """Who sent it; empty where it is no node that is known."""
        return self._known_as(reply.metadata.src_node_id)

    def _named(self, node_id: int) -> str:
        return self._known_as(node_id) or str(node_id)

    def _known_as(self, node_id: int) -> str:
        return next((name for name, known in self._ids.items() if known == node_id), "")

    def message(self, name: str, kind: str, content: RecordDict) -> Message:
        return Message(content=content, dst_node_id=self._ids[name], message_type=kind)

    def exchange(self, messages: Iterable[Message], timeout_s: float) -> tuple[dict[str, Message], dict[str, str]]:
        """Sends all at once. Returns the replies by node, and for each node without one the reason."""
        missing: dict[str, str] = {}
        arrived = self.arriving(messages, timeout_s, missing)
        return {self._named(message.metadata.src_node_id): message for message in arrived}, missing

    def arriving(
        self,
        messages: Iterable[Message],
        timeout_s: float,
        missing: dict[str, str],
        one_by_one: bool = False,
        sites: Sequence[Ending] = (),
    ) -> Iterator[Message]:
        """Sends all at once and gives each reply as it comes; `missing` gets the reason of each node without one.

        With `one_by_one` no second reply is fetched before the first was taken, and none is held here. Of `sites` those
        are given up that stay silent behind the others.
        """
        end = time.monotonic() + timeout_s
        messages = list(messages)
        destinations = [message.metadata.dst_node_id for message in messages]
        waiting = dict(zip(self.grid.push_messages(messages), destinations, strict=True))
        del messages  # each holds an adapter
        pause_s = _FIRST_POLL_S
        while waiting and time.monotonic() < end:
            for asked in [[message_id] for message_id in waiting] if one_by_one else [list(waiting)]:
                found = list(self.grid.pull_messages(asked))
                while found:
                    node_id = waiting.pop(found[-1].metadata.reply_to_message_id)
                    if found[-1].has_error():
                        missing[self._named(node_id)] = f"its ClientApp failed: {found.pop().error.reason}"
                    else:
                        yield found.pop()
            present = set(self.grid.get_node_ids()) if waiting else set()
            silent = {self._named(node_id) for node_id in waiting.values()}
            late = {name: f"no reply {s.limit_s:.0f} s after its site" for s in sites for name in s.late(silent)}
            for message_id, node_id in list(waiting.items()):
                name = self._named(node_id)
                if node_id not in present or name in late:
                    del waiting[message_id]
                    missing[name] = late.get(name, "left the federation")
            if waiting:
                time.sleep(pause_s)
                pause_s = min(_POLL_S, 1.2 * pause_s)
        for node_id in waiting.values():
            missing[self._named(node_id)] = f"no reply within {timeout_s:.0f} s"

    def _enrol(self, node_id: int, profile: pb.Profile) -> None:
        problem = profile.problem
        if profile.protocol_version != PROTOCOL_VERSION:
            problem = f"speaks protocol version {profile.protocol_version}, this server {PROTOCOL_VERSION}: install the same edgelam-fl"
        elif profile.name in self._ids and self._ids[profile.name] != node_id and profile.name in self.profiles:
            problem = "another node has this name already; give each its own with --name"
        elif profile.address.startswith(BEHIND) and not self.request.hub_port:
            problem = "can be reached by a relay alone (--listen relay), and this server has none: start it with `edgelam server`"
        if problem:
            self._refuse(profile.name, problem)
            return
        self._lost.discard(node_id)
        self._ids[profile.name] = node_id
        self.profiles[profile.name] = profile
        self.problems.pop(profile.name, None)
        self.folder.emit(
            "node_joined", node=profile.name, role=pb.Role.Name(profile.role).lower(), address=profile.address,
            examples=profile.examples, held_out=profile.held_out,
            memory_available_bytes=profile.memory_available_bytes, cpu_threads=profile.cpu_threads, tags=list(profile.tags),
            base_seconds=_finite(profile.base_seconds), **_measured(profile),
        )  # fmt: skip

    def _refuse(self, name: str, reason: str) -> None:
        if self.problems.get(name) != reason:  # it is asked again and again
            self.folder.emit("node_refused", node=name, reason=reason)
        self.problems[name] = reason

    def _forget(self, name: str, reason: str) -> None:
        self.profiles.pop(name, None)
        self._ids.pop(name, None)
        self.problems[name] = reason


def _measured(profile: pb.Profile) -> dict[str, Any]:
    """What a node measures only where it is asked to."""
    layers = [{"tokens": time.tokens, "seconds": _finite(time.seconds)} for time in profile.layer_times]
    found = {**_link(profile), "layer_times": layers, "idle_bytes": profile.idle_bytes}
    return {key: value for key, value in found.items() if value}


def _link(profile: pb.Profile) -> dict[str, float]:
    return _finite({key: getattr(profile, key) for key in _LINK})


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if math.isfinite(value)}
