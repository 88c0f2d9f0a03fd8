"""What nodes trained: read from their replies, checked against their plans, and joined to one contribution per source.

Nothing that a node sends is trusted: names, shapes, types, values, sources and weights are checked against its plan. Knows
nothing about aggregation, nor how replies travel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from flwr.app import RecordDict
from google.protobuf.message import DecodeError

from edgelam_fl.errors import ProtocolError
from edgelam_fl.flower import views
from edgelam_fl.model.adapter import PREFIX, Adapter, Joined, Span, blocks
from edgelam_fl.model.lora import PLAIN
from edgelam_fl.plan.layout import Layout, site_source
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import end_spans, hosted_span, kind_of
from edgelam_fl.split.judging import Size
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import Arrived
from server.global_adapter import StartingPoints
from server.judging import QUIET, UpdateJudge, square_sum
from server.report_words import with_bounded_words
from server.reports import report_problem
from strategies.aggregation.factors import is_factor, module_of
from strategies.aggregation.fedavg import WeightedMean
from strategies.api import Contribution
from strategies.registry import Capabilities

_UNREADABLE = (DecodeError, ProtocolError, KeyError, TypeError, ValueError, EOFError, OSError)
_ROUNDING = 1e-9  # relative, of a sum of learning rates
KEPT_NODES = 32  # the most nodes of a round whose replies are kept
FIRST_REPLIES = 8  # of a large round, which are judged together: before them there is no median
MOST_VALUE = 1e4  # of any trained number; factors that are any good stay far below


@dataclass(frozen=True, slots=True)
class Reply:
    """One node's reply: its report, and the tensors of the report's contributions, in their order."""

    stored: pb.JobReport | bytes
    """Bytes: packed, at a tenth of the size, and unpacked whenever the report is read."""
    tensors: tuple[Mapping[str, np.ndarray], ...] = ()
    dropped_bytes: tuple[int, ...] = ()
    """The size of each contribution's tensors, if they were dropped."""

    @property
    def report(self) -> pb.JobReport:
        """The report; unpacked by every call if it is stored packed."""
        return pb.JobReport.FromString(self.stored) if isinstance(self.stored, bytes) else self.stored

    def bytes_of(self, scope: str) -> int:
        """Returns the bytes of all tensors of a scope ("ends", "site")."""
        sizes = self.dropped_bytes or self._sizes()
        return sum(size for part, size in zip(self.report.contributions, sizes, strict=True) if part.scope == scope)

    def without_tensors(self) -> Reply:
        """Returns the little of the reply that a large round keeps."""
        return Reply(self.report.SerializeToString(), dropped_bytes=self._sizes())

    def _sizes(self) -> tuple[int, ...]:
        return tuple(map(_size_bytes, self.tensors))


@dataclass(frozen=True, slots=True)
class Reported(Arrived):
    """A node's reply with its report, which is read once: a long timeline has thousands of words to look at."""

    report: pb.JobReport


def _size_bytes(tensors: Mapping[str, np.ndarray]) -> int:
    return tensors.numbers.nbytes if isinstance(tensors, Joined) else sum(array.nbytes for array in tensors.values())


def read_reply(content: RecordDict) -> Reply:
    """Reads a reply: its report, and the tensors of contribution i from "adapter-i". Garbage becomes a failed report."""
    return reply_of(read_report(content), content)


def reply_of(report: pb.JobReport, content: RecordDict) -> Reply:
    """Reads the tensors of a reply whose report has been read."""
    try:
        parts = range(len(report.contributions))
        return Reply(report, tuple(views(content[f"adapter-{number}"]) for number in parts))
    except _UNREADABLE as error:
        return Reply(_unreadable(error))


def read_report(content: RecordDict) -> pb.JobReport:
    """Reads the report of a reply alone. Garbage becomes a failed report."""
    try:
        return with_bounded_words(pb.JobReport.FromString(content["report"]["report"]))
    except _UNREADABLE as error:
        return _unreadable(error)


def _unreadable(error: Exception) -> pb.JobReport:
    return pb.JobReport(state="failed", error=f"its reply cannot be read: {type(error).__name__}")


def why_unusable(reply: Reply, plan: pb.Plan, starts: StartingPoints, judge: UpdateJudge | None = None) -> str:
    """Returns why a reply cannot be used; empty: it can. `starts`: of the global adapter, for the shapes. `judge`: who measures its
    updates afterwards; None: nobody does.
    """
    if reply.report.state != "done":
        return reply.report.error or f"its report says {reply.report.state!r}"
    if reply.report.role not in (plan.role, 0):  # 0: it says none, and shows up in no table
        return f"its report is that of role {reply.report.role}; its plan's is {plan.role}"
    seen: dict[tuple[str, str], set[str]] = {}
    for part, tensors in zip(reply.report.contributions, reply.tensors, strict=True):
        where = spans_of_source(plan, part.scope, part.source)
        if where is None:
            return f"its contribution {part.scope!r} of {part.source!r} is none of its plan's"
        most = _most_labels(plan, part)
        if not (math.isfinite(part.weight) and 0 <= part.weight <= most):
            return f"its contribution of {part.source!r} weighs {part.weight}; the plan allows 0 to {most} labels"
        if part.lr_sum and not _least_lr(plan) <= part.lr_sum <= _most_lr(plan, part):
            return f"its contribution of {part.source!r} has a sum of learning rates, {part.lr_sum}, which its plan's cannot"
        wrong = _wrong_tensor(tensors, starts.trained_shapes(plan, where, ends=part.scope == "ends"), judge)
        if wrong:
            return wrong
        names = seen.setdefault((part.scope, part.source), set())
        if twice := names & tensors.keys():
            return f"it contributes {min(twice)} of {part.source!r} twice"
        names.update(tensors)
    return report_problem(reply.report, plan)


def spans_of_source(plan: pb.Plan, scope: str, source: str) -> list[Span] | None:
    """Returns the layers that a source trains at the plan's node; None: the node has no such source."""
    if scope == "ends":
        return end_spans(plan) if plan.routes and source == plan.node else None
    hosted = hosted_span(plan)
    if scope != "site" or hosted is None:
        return None
    if host_mode(plan.host_mode).is_shared(scope):
        return [hosted] if source == plan.site else None
    hops = [hop for route in plan.serves if route.device == source for hop in route.hops if hop.node == plan.node]
    return [Span(hop.first, hop.last, head=hosted.head) for hop in hops] or None


def _most_labels(plan: pb.Plan, part: pb.Contribution) -> int:
    """Returns the labels of a full round of the contribution's devices."""
    devices = len(plan.serves) if host_mode(plan.host_mode).is_shared(part.scope) else 1
    steps = plan.own_steps if part.scope == "ends" else plan.steps
    return devices * steps * plan.batch_size * plan.task.max_tokens


def _least_lr(plan: pb.Plan) -> float:
    """Returns the smallest learning rate of any step."""
    return min(plan.optimizer.lrs, default=0.0) * (1 - _ROUNDING)


def _most_lr(plan: pb.Plan, part: pb.Contribution) -> float:
    """Returns the sum of the learning rates of all steps that the source makes."""
    times = host_mode(plan.host_mode).steps_of_source(part.scope, len(plan.serves))
    return times * math.fsum(plan.optimizer.lrs) * (1 + _ROUNDING)


@QUIET
def _wrong_tensor(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], judge: UpdateJudge | None
) -> str:
    """Returns what is wrong with the first bad tensor; empty: all are as expected, by their shapes."""
    are_bounded = False
    if isinstance(tensors, Joined):
        are_expected = all(expected.get(name) == shape for name, shape in tensors.layout)
        if tensors and are_expected and judge is not None and judge.is_bounded(tensors, MOST_VALUE):
            return ""
        are_bounded = _square_sum(tensors.numbers) <= MOST_VALUE**2
        if are_bounded and are_expected:
            return ""
    for name, array in tensors.items():
        if name not in expected:
            return f"its update has a tensor {name}, which its plan does not let it train"
        if array.shape != expected[name] or array.dtype != np.float32:
            return f"its {name} is {array.dtype} {array.shape}, not float32 {expected[name]}"
        if not (are_bounded or _is_bounded(array)):
            return f"its {name} holds values that are not finite, or beyond {MOST_VALUE:g}"
    return ""


def _square_sum(numbers: np.ndarray) -> float:
    return sum(square_sum(numbers[block]) for block in blocks(len(numbers)))


def _is_bounded(array: np.ndarray) -> bool:
    """Whether all values are finite and at most MOST_VALUE. If the sum of their squares says so, which takes a third of the time, no value is looked at."""
    return square_sum(array) <= MOST_VALUE**2 or not array.size or bool(np.abs(array).max() <= MOST_VALUE)


def broken_sites(layout: Layout, present: Collection[str]) -> dict[str, list[str]]:
    """Returns the sites that lack hosts, with the names of these hosts: half of a chain's update fits nothing."""
    missing = {site.name: [host.name for host in site.hosts if host.name not in present] for site in layout.sites}
    return {site: hosts for site, hosts in missing.items() if hosts}


def contributions_of(
    replies: Mapping[str, Reply], plans: Mapping[str, pb.Plan], layout: Layout, broken: Collection[str]
) -> list[Contribution]:
    """Returns one contribution per source and weight, in an order that does not depend on the order of the replies.

    A source is a device with its ends and, with copies, its adapters on hosts; or a site with the layers of its chain. A
    source has several weights if fewer devices' labels went through some of its layers. Nothing of a `broken` site counts,
    nor the ends of its devices: they were trained against a middle that is lost.
    """
    merged: dict[tuple[str, float, float], Adapter] = {}
    scales: dict[tuple[str, float, float], dict[str, float]] = {}
    for name, reply in sorted(replies.items()):
        for site, one in parts_by_site(name, reply, plans[name], layout):
            if site not in broken:
                key = one.source, one.weight, one.lr_sum
                merged.setdefault(key, {}).update(one.tensors)
                scales.setdefault(key, {}).update(one.scales)
    return [
        Contribution(key[0], key[1], tensors, scales[key], key[2]) for key, tensors in sorted(merged.items(), key=_key)
    ]


def parts_by_site(name: str, reply: Reply, plan: pb.Plan, layout: Layout) -> Iterator[tuple[str, Contribution]]:
    """Yields each part of a node's reply that has weight and tensors, with the site whose loss would make it worthless."""
    for part, tensors in zip(reply.report.contributions, reply.tensors, strict=True):
        if part.weight > 0 and tensors:
            of_site = host_mode(plan.host_mode).is_shared(part.scope)
            source = site_source(part.source) if of_site else part.source
            scales = _scales(plan, _modules(tuple(tensors)))
            site = layout.site_of(name).name if part.scope == "ends" else plan.site
            yield site, Contribution(source, part.weight, tensors, scales, part.lr_sum)


@lru_cache(maxsize=16)  # the nodes of a round train few different sets of tensors
def _modules(tensors: tuple[str, ...]) -> frozenset[str]:
    """Returns the modules that factors among the named tensors belong to."""
    return frozenset(module_of(tensor) for tensor in tensors if is_factor(tensor))


def _scales(plan: pb.Plan, modules: Collection[str]) -> dict[str, float]:
    """Returns s in W + s B A of each module on the plan's node."""
    kind, lora = kind_of(plan), plan.lora
    if kind == PLAIN:
        return dict.fromkeys(modules, lora.alpha / lora.rank)
    bare = {module: module.removeprefix(PREFIX) for module in modules}
    return {module: kind.scale_of(name, kind.rank_of(name, lora.rank), lora.alpha) for module, name in bare.items()}


def _key(item: tuple[tuple[str, float, float], Adapter]) -> tuple[str, float, float]:
    return item[0]


# ---------------------------------------------------------------- large rounds


def sums_on_arrival(aggregation: Capabilities, nodes: int, kept_nodes: int = KEPT_NODES) -> bool:
    """Returns whether the replies of `nodes` nodes are summed up as they arrive, instead of being kept."""
    return nodes > kept_nodes and aggregation.needs_only_mean


class RunningMeans:
    """The weighted means of what has arrived, per site: as large as two updates each, however many arrive."""

    def __init__(self, judge: UpdateJudge) -> None:
        """`judge`: of the updates, each by the median of those that have arrived."""
        self.left_out: dict[str, str] = {}
        """Why a contribution does not count, by source."""
        self._judge = judge
        self._first: list[tuple[str, Contribution, Size]] = []  # wait until there is a median
        self._judged = 0
        self._of_site: dict[str, WeightedMean] = {}
        self._scales: dict[str, float] = {}

    def add(self, parts: Iterable[tuple[str, Contribution]]) -> None:
        """Adds the parts of one reply, each with its site. Keeps the tensors of the first few replies alone."""
        measured = [(site, contribution, self._judge.measure([contribution])) for site, contribution in parts]
        self._first += measured
        self._judged += 1
        if self._judged >= FIRST_REPLIES:
            self._take()

    def _take(self) -> None:
        while self._first:
            site, contribution, size = self._first.pop(0)
            problem = self._judge.problem(contribution.source, size)
            if problem:
                self.left_out[contribution.source] = problem
                continue
            self._of_site.setdefault(site, WeightedMean()).add(contribution)
            self._scales.update(contribution.scales)

    def contributions(self, broken: Collection[str]) -> list[Contribution]:
        """Returns one contribution per total weight, without the `broken` sites. Takes the sums out: a second call has none."""
        self._take()
        mean = WeightedMean()
        for site in sorted(self._of_site.keys() - set(broken)):
            mean.merge(self._of_site.pop(site))
        return [Contribution("the mean", weight, tensors, self._scales) for weight, tensors in mean.by_weight()]
