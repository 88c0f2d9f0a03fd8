"""One attempt at a round while its nodes are at work: who is lost, whose work has become pointless, what is sent again.

Nodes attend at the hub while they play their parts, and the attempt looks there (`server.attendance`). A host that fails,
restarts or stays silent ends the attempt for its site at once; a device that does so leaves the attempt alone. Both are told
to the nodes that would wait. A node that does not attend is waited for as long as the nodes' own deadlines allow. Knows nothing
about tensors and aggregation, nor how the next attempt is planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from edgelam_fl.errors import Restarted
from edgelam_fl.plan.layout import Site
from edgelam_fl.plan.reading import job_id
from edgelam_fl.telemetry.events import AttemptAborted, Emit, MessageResent, NodeSilent, RoundProgress
from edgelam_fl.wire import edgelam_pb2 as pb
from server.attendance import Attendance, Presence
from server.exchange import LEFT, Arrived, Exchange, ExchangeTiming, Missing, Request, Unanswered, Verdict, WhoLeft
from server.lateness import Lateness
from server.parcels import parcel_of
from server.replies import Reported, read_report
from server.signs import Signs
from server.state import Parcel, PlannedRound

_ATTEMPTS = 3  # at a round
_SLOWER = 3  # a node may take so many times as long to begin as it did before
_LEAST_BEGIN_S = 8.0  # until a node that has got its message attends
_LEAST_BYTES_S = 1.25e6  # of a message on its way to a node
_MOST_RESENT = 2  # of one message
MOST_KEPT = 8  # snapshots that a node may report
_STANDSTILL_S = 3.0  # between two looks, more than is meant: this process was frozen, or had other work
_SAY_S = 10.0  # between two signs of life while a silent node is waited for


@dataclass(frozen=True, slots=True)
class SiteDeadline:
    """The nodes of one site, whose parts end together: once its hosts have replied, or every member, the rest have `limit_s`.

    Flower keeps listing a SuperNode that lost a message (its process was started again with the message half done): without
    this limit the server would wait until the round's deadline for such a node if it does not attend.
    """

    hosts: frozenset[str]
    members: frozenset[str]
    limit_s: float

    def is_through(self, silent: Set[str]) -> bool:
        """Returns whether the time of the site's `silent` nodes is running."""
        return not self.hosts <= silent or not self.members & silent


class SiteDeadlines:
    """Gives up the nodes that leave, and those that stay silent for too long after the rest of their site."""

    def __init__(self, sites: Iterable[SiteDeadline], now: Callable[[], float]) -> None:
        self._now = now
        self._through_since = dict.fromkeys(sites, math.inf)

    def look(self, silent: Mapping[str, Unanswered]) -> Verdict:
        late = {name: reason for name, reason in self.late(silent.keys()).items() if name in silent}
        return Verdict(lost={**late, **WhoLeft().look(silent).lost})

    def late(self, names: Set[str]) -> dict[str, str]:
        """Returns why nodes are late, by name; `names`: those without an answer."""
        now = self._now()
        since = self._through_since
        since |= {site: min(t, now) if site.is_through(names) else math.inf for site, t in since.items()}
        late = [site for site, t in since.items() if now - t > site.limit_s]
        return {
            name: f"no reply {site.limit_s:.0f} s after its site" for site in late for name in site.hosts | site.members
        }


@dataclass(slots=True)
class Beginnings:
    """How nodes take their messages, as a run has seen it so far."""

    took_s: dict[str, list[float]] = field(default_factory=dict)
    """The times from a node's last two messages to its first signs of life, by its name."""
    mute: set[str] = field(default_factory=set)
    """Nodes that answer and do not attend: the hub cannot be reached from there."""

    def note(self, name: str, took_s: float) -> None:
        """Notes that a node began so long after its message."""
        self.took_s[name] = [*self.took_s.get(name, ())[-1:], took_s]
        self.mute.discard(name)

    def note_silent(self, name: str, took_s: float) -> None:
        """Notes that a node did its part in so long a time, and never attended."""
        if took_s >= _LEAST_BEGIN_S and name not in self.took_s:
            self.mute.add(name)

    def patience_s(self, name: str, unknown_s: float) -> float:
        """Returns when a message to a node counts as lost; `unknown_s`: if it has never attended. One slow beginning is no habit."""
        return max(_LEAST_BEGIN_S, _SLOWER * min(self.took_s[name])) if name in self.took_s else unknown_s


@dataclass(slots=True)
class _Node:
    """One node of the attempt, as the server has heard of it. Times are by the server's clock."""

    sent_s: float
    resent: int = 0
    heard_s: float | None = None  # None: it has not attended
    state: str = ""  # as of its last sign of life; empty: none yet
    over_s: float = math.inf  # since when its part is over
    restarted: bool = False
    said_s: float = -math.inf  # when its silence was said last


class Tries:
    """Numbers the attempts at a round. One that lost a host by chance does not count while the round is younger than its limit."""

    def __init__(self, now: Callable[[], float], limit_s: float) -> None:
        self.number = 0  # of the newest attempt
        self._counted, self._now, self._end_s = 0, now, now() + limit_s

    def __iter__(self) -> Iterator[int]:
        while self._counted < _ATTEMPTS and (self.number == self._counted or self._now() < self._end_s):
            self.number += 1
            yield self.number

    def failed(self, *, by_chance: bool) -> None:
        """Notes that the newest attempt came to nothing."""
        self._counted += not by_chance


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a site's attempt."""

    by: str  # the host
    reason: str
    at_s: float


class Attempt:
    """The exchange of one attempt. Also the watch over it: gives nodes up, and has messages sent again."""

    def __init__(
        self,
        planned: PlannedRound,
        exchange: Exchange,
        attendance: Attendance,
        emit: Emit,
        *,
        message_to: Callable[[str, Parcel], Request],
        beginnings: Beginnings,
        can_replace: bool,
        limit_s: float,
        lateness: Lateness,
        waits_for_late: bool,
        tell: Callable[[RoundProgress | None], None] = lambda progress: None,
    ) -> None:
        """`message_to`: makes the message that hands a node its part, with these tensors. `can_replace`: whether another host can
        take a host's place. `limit_s`: for an answer. `lateness`: when a device is late. `waits_for_late`: whether a late device may go
        on, as its update may be used later. `tell`: takes where the nodes are, for people; None: they play no more.
        """
        self.planned, self.limit_s = planned, limit_s
        self.ended: dict[Site, _End] = {}
        self.silent: set[str] = set()
        """Nodes that were given up because nothing was heard of them."""
        self.kept: dict[str, Sequence[pb.StepSnapshot]] = {}
        """The snapshots of this round that each node reported, oldest first."""
        self.late: dict[str, str] = {}
        """Why devices are late, by name."""
        self._lateness, self._waits_for_late = lateness, waits_for_late
        self._delivered_s: dict[str, float] = {}  # when devices did, in seconds since the attempt began
        self._exchange, self._attendance, self._emit = exchange, attendance, emit
        self._timing = exchange.timing
        self._message_to, self._beginnings, self._can_replace = message_to, beginnings, can_replace
        self._job = job_id(next(iter(planned.plans.values()))) if planned.plans else ""
        self._devices = frozenset(planned.lineup.names)
        now = self._timing.now()
        self._nodes = {name: _Node(now) for name in planned.plans}
        self._out: dict[str, str] = {}  # why nodes are out of the attempt, as all hear it
        self._out_since: dict[str, float] = {}
        self._next_look_s = self._looked_s = now
        self._needed: dict[str, Parcel] = {}  # what is to be sent to nodes that have asked for tensors
        self.supplied_bytes: dict[str, int] = {}
        """By node that has asked for tensors, which each may do once: their size."""
        facts = planned.facts
        self._signs = Signs(facts.round, facts.attempt, planned.began_s, tell=tell, emit=emit)
        self._deadlines = SiteDeadlines(_site_deadlines(planned, self._timing), self._timing.now)

    @property
    def lost_a_host(self) -> bool:
        """Whether a host vanished, so that the attempt says nothing about whether the round can succeed."""
        return any(end.by in self.silent or self._nodes[end.by].restarted for end in self.ended.values())

    def is_back(self, name: str) -> bool:
        """Returns whether a node is here again that was lost because its stage host was started again."""
        return self._nodes[name].restarted

    def is_bystander(self, name: str) -> bool:
        """Returns whether a node has nothing to answer for: its site's attempt ended because of another."""
        ends = [end for site, end in self.ended.items() if name in site.nodes]
        return bool(ends) and name not in self.silent and all(end.by != name for end in ends)

    def answers(self, requests: Iterable[Request]) -> Iterator[Reported | Missing]:
        """Sends the requests and yields each node's answer. A node that asks for tensors is sent them, and answers later."""
        one_by_one = self.planned.sums_on_arrival
        arriving = self._exchange.replies(requests, self.limit_s, one_by_one=one_by_one, watch=self)
        yield from filter(None, map(self._noted, arriving))  # keeps no answer, which a loop's variable would

    def close(self) -> None:
        """Tells all nodes that the attempt is over."""
        self._signs.end()
        if self._job and not (self._waits_for_late and self.late):
            self._attendance.look(self._job, "this attempt at the round is over", self._out)

    # ---------------------------------------------------------------- what is heard

    def _noted(self, answer: Arrived | Missing) -> Reported | Missing | None:
        """Takes note of an answer and returns it; None: it is a question, and the node has yet to answer."""
        if isinstance(answer, Missing):
            if answer.name not in self.late or not self._waits_for_late:
                self._lose(answer.name, answer.reason)
            return answer
        report = read_report(answer.content)
        if report.state == "needs" and answer.name not in self.supplied_bytes:
            parcel = parcel_of(self.planned, answer.name, report)
            self._needed[answer.name], self.supplied_bytes[answer.name] = parcel, parcel.size_bytes
            return None
        self.kept[answer.name] = report.snapshots[-MOST_KEPT:]
        if report.state == "done" and self._nodes[answer.name].heard_s is None:
            self._beginnings.note_silent(answer.name, self._timing.now() - self._nodes[answer.name].sent_s)
        if report.code == Restarted.code:
            self._nodes[answer.name].restarted = True
        if report.state == "done" and answer.name in self._devices:
            self._delivered_s[answer.name] = self._timing.now() - self.planned.began_s
        if report.state not in ("done", "running"):  # running: the part was handed over, and is asked for later
            self._lose(answer.name, report.error)
        return Reported(answer.name, answer.content, report)

    def _listen(self) -> None:
        """Looks at who attends, and tells who is out."""
        now = self._timing.now()
        if now < self._next_look_s or not self._attendance.works:
            return
        if (late_s := now - self._looked_s - self._timing.look_s) >= _STANDSTILL_S:
            for node in self._nodes.values():
                node.sent_s += late_s  # no message went out meanwhile, and no sign of life came in
        self._next_look_s, self._looked_s = now + self._timing.look_s, now
        seen = self._attendance.look(self._job, "", self._out)
        for name, node in self._nodes.items():
            if name in seen:
                self._hear(name, node, seen[name], now)
            elif not seen and node.heard_s is not None:
                node.heard_s = now  # the hub is away, and no node is judged by its silence
        self._signs.hear({name: one.progress for name, one in seen.items() if one.progress is not None}, now)

    def _hear(self, name: str, node: _Node, seen: Presence, now: float) -> None:
        if node.heard_s is None:
            self._beginnings.note(name, now - node.sent_s)
        node.heard_s = max(node.heard_s or 0.0, now - seen.silent_s)
        node.restarted = node.restarted or seen.restarted
        node.state = seen.state
        if seen.state != "running":
            node.over_s = min(node.over_s, now)
        if seen.state == "failed":
            self._lose(name, "its part failed")  # its report, which says more, is on its way

    # ---------------------------------------------------------------- what follows from it

    def look(self, silent: Mapping[str, Unanswered]) -> Verdict:
        """Gives up the nodes of which nothing is to come, and sends messages again that reached nobody."""
        self._listen()
        late = self._deadlines.late(silent.keys())
        lost: dict[str, str] = {}
        for name, peer in silent.items():
            if self._nodes[name].restarted:
                self._lose(name, "its stage host was started again")
            elif reason := self._why_lost(name, peer) or ("" if self._attends(name) else late.get(name, "")):
                lost[name] = reason
                self.silent.add(name)
                self._lose(name, reason)
        lost |= self._late(silent.keys() - lost.keys())
        out = [name for name in silent.keys() - lost.keys() if name in self._out]
        lost |= {name: self._out[name] for name in out if not silent[name].is_here or self._has_had_its_say(name)}
        supplies = [self._message_to(name, parcel) for name, parcel in self._needed.items()]
        self._needed.clear()
        again = [name for name, peer in silent.items() if name not in lost and self._is_due(name, peer)]
        return Verdict(lost=lost, again=supplies + [self._resent(name, silent[name]) for name in again])

    def _attends(self, name: str) -> bool:
        return self._nodes[name].heard_s is not None

    def _has_had_its_say(self, name: str) -> bool:
        """Returns whether a node that is out has had the time for its report, which says what it keeps."""
        hears = self._attends(name) or name in self._beginnings.took_s
        return hears and self._timing.now() - self._out_since.get(name, math.inf) >= self._timing.cancelled_s

    def _why_lost(self, name: str, peer: Unanswered) -> str:
        """Returns why nothing is to be heard of a node any more; empty: it is waited for."""
        node, timing, now = self._nodes[name], self._timing, self._timing.now()
        if node.heard_s is None:
            if not peer.is_here or (peer.problem and not self._may_resend(name)):
                return peer.why_lost
            takes_none = name in self._beginnings.took_s and node.resent == _MOST_RESENT
            return f"it took none of {1 + _MOST_RESENT} messages" if takes_none and self._is_late(name) else ""
        if node.state != "running":
            limit_s = timing.messages_s if peer.is_here else timing.device_silent_s
            return f"no reply {limit_s:.0f} s after its part's end" if now - node.over_s >= limit_s else ""
        silent_s = now - node.heard_s
        if not peer.is_here and silent_s >= timing.left_s:
            return LEFT
        limit_s = self._silence_s(name)
        if silent_s >= timing.strikes_s and silent_s < limit_s and now - node.said_s >= _SAY_S:
            node.said_s = now
            facts = self.planned.facts
            self._emit(NodeSilent(round=facts.round, node=name, seconds=round(silent_s, 1), limit_s=limit_s))
        return f"silent for {silent_s:.0f} s" if silent_s >= limit_s else ""

    def _late(self, silent: Set[str]) -> dict[str, str]:
        """Returns why devices are late, by name. A device that hosts is never late: others need it to end."""
        names = [name for name in self.planned.lineup.names if name in silent and not self._hosted_by(name)]
        now_s = self._timing.now() - self.planned.began_s
        reason = (
            self._lateness.why_late([*self._delivered_s.values()], now_s) if names and self.planned.facts.steps else ""
        )
        if not reason:
            return {}
        self.late |= dict.fromkeys(names, reason)
        self.silent |= set(names)
        for name in () if self._waits_for_late else names:
            self._lose(name, reason)
        return dict.fromkeys(names, reason)

    def _silence_s(self, name: str) -> float:
        """Returns how long a node may be silent."""
        if not self._hosted_by(name):
            return self._timing.device_silent_s
        return self._timing.strikes_s if self._can_replace else self._timing.host_silent_s

    def _lose(self, name: str, reason: str) -> None:
        """Has nobody wait for a node any more. A host's loss ends its site's attempt for all of its nodes."""
        if name in self._out or not self._attendance.works:
            return
        self._out[name], self._out_since[name] = reason, self._timing.now()
        self._next_look_s = self._timing.now()  # tell it at once
        for site in self._hosted_by(name):
            self._end(site, name, reason)

    def _end(self, site: Site, by: str, reason: str) -> None:
        if site in self.ended:
            return
        now, facts = self._timing.now(), self.planned.facts
        self.ended[site] = _End(by, reason, now)
        aborted = AttemptAborted(
            round=facts.round, attempt=facts.attempt, site=site.name, node=by, reason=reason,
            seconds=round(now - self.planned.began_s, 3),
        )  # fmt: skip
        self._emit(aborted)
        for name in site.nodes:
            self._lose(name, f"host {by} is out: {reason}")

    def _hosted_by(self, name: str) -> list[Site]:
        return [site for site in self.planned.layout.sites if any(host.name == name for host in site.hosts)]

    # ---------------------------------------------------------------- lost messages

    def _may_resend(self, name: str) -> bool:
        """Returns whether a node without a message is sent another one."""
        return self._attendance.works and name not in self._out and self._nodes[name].resent < _MOST_RESENT

    def _is_due(self, name: str, peer: Unanswered) -> bool:
        """Returns whether a node's message is to be sent again: it got none, or its reply was lost."""
        node = self._nodes[name]
        if not peer.is_here or not self._may_resend(name):
            return False
        if peer.problem:
            return True
        if node.heard_s is None:
            is_once = name not in self._beginnings.took_s and node.resent
            return not is_once and name not in self._beginnings.mute and self._is_late(name)
        over_s = self._timing.now() - node.over_s
        return node.state == "done" and over_s >= _LEAST_BEGIN_S * 2**node.resent

    def _is_late(self, name: str) -> bool:
        """Returns whether a node that did not attend at the last look had had the time for it: for the last message, twice as long."""
        node = self._nodes[name]
        sending_s = self.planned.parcels[name].size_bytes / _LEAST_BYTES_S
        patience_s = self._beginnings.patience_s(name, self._timing.resend_s) + sending_s
        return self._looked_s - node.sent_s >= patience_s * (2 if node.resent == _MOST_RESENT else 1)

    def _resent(self, name: str, peer: Unanswered) -> Request:
        node, facts, now = self._nodes[name], self.planned.facts, self._timing.now()
        unheard = "it has not begun" if node.heard_s is None else "its part is over, and no reply has come"
        reason = peer.problem or unheard
        seconds = now - (node.sent_s if node.heard_s is None else min(now, node.over_s))
        node.resent, node.sent_s = node.resent + 1, now if node.heard_s is None else node.sent_s
        event = MessageResent(
            round=facts.round, attempt=facts.attempt, node=name, seconds=round(seconds, 1), reason=reason
        )
        self._emit(event)
        return self._message_to(name, self.planned.parcels[name])


def _site_deadlines(planned: PlannedRound, timing: ExchangeTiming) -> list[SiteDeadline]:
    """Returns the sites whose nodes wait for each other. A node that began late has to wait for its peers, too."""
    if not planned.plans:
        return []
    deadlines = next(iter(planned.plans.values())).deadlines
    limit_s = deadlines.ready_s + deadlines.step_s + timing.messages_s
    return [
        SiteDeadline(frozenset(host.name for host in site.hosts), frozenset(site.members), limit_s)
        for site in planned.layout.sites
        if site.hosts
    ]
