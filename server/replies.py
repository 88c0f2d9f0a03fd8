"""What nodes trained: read out of their replies, checked against their plans, and put together a source.

Nothing that a node sends is trusted: names, shapes, types, values, sources and weights are held against its plan.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import RecordDict
from google.protobuf.message import DecodeError

from edgelam_fl.flower import views
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter, Span
from edgelam_fl.model.carry import is_carry
from edgelam_fl.plan.layout import Layout, site_source
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.plan.reading import end_spans, hosted_span
from edgelam_fl.wire import edgelam_pb2 as pb
from server.global_adapter import at_rank
from strategies.aggregation.factors import A, B, is_factor, module_of
from strategies.aggregation.fedavg import WeightedMean
from strategies.api import Contribution
from strategies.registry import Capabilities

_ROUNDING = 1e-9  # of a sum of learning rates


@dataclass(frozen=True, slots=True)
class Reply:
    given: pb.JobReport | bytes  # bytes: packed, a tenth of the size; read whenever it is asked for
    tensors: tuple[Adapter, ...] = ()  # of the report's contributions, in their order
    let_go_bytes: tuple[int, ...] = ()  # what these took, where they were summed up and let go

    @property
    def report(self) -> pb.JobReport:
        return pb.JobReport.FromString(self.given) if isinstance(self.given, bytes) else self.given

    def bytes_of(self, scope: str) -> int:
        sizes = self.let_go_bytes or self._sizes()
        return sum(size for part, size in zip(self.report.contributions, sizes, strict=True) if part.scope == scope)

    def without_tensors(self) -> Reply:
        """As little as a large round has to keep."""
        return Reply(self.report.SerializeToString(), let_go_bytes=self._sizes())

    def _sizes(self) -> tuple[int, ...]:
        return tuple(sum(array.nbytes for array in tensors.values()) for tensors in self.tensors)


def read_reply(content: RecordDict) -> Reply:
    """A node's report; the tensors of contribution i came beside it as "adapter-i". Garbage is a report that failed."""
    try:
        report = pb.JobReport.FromString(content["report"]["report"])
        count = len(report.contributions)
        return Reply(report, tuple(views(content[f"adapter-{number}"]) for number in range(count)))
    except (DecodeError, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        return Reply(pb.JobReport(state="failed", error=f"its reply cannot be read: {type(error).__name__}: {error}"))


def problem(reply: Reply, plan: pb.Plan, adapter: Adapter) -> str:
    """Why a reply cannot be used; empty if it can. `adapter`: the global one, for the shapes."""
    if reply.report.state != "done":
        return reply.report.error or f"its report says {reply.report.state!r}"
    seen: set[tuple[str, str, str]] = set()
    for part, tensors in zip(reply.report.contributions, reply.tensors, strict=True):
        where = spans_of_source(plan, part.scope, part.source)
        if where is None:
            return f"its contribution {part.scope!r} of {part.source!r} is none of its plan's"
        most = _most_labels(plan, part)
        if not (math.isfinite(part.weight) and 0 <= part.weight <= most):
            return f"its contribution of {part.source!r} weighs {part.weight}; the plan allows 0 to {most} labels"
        if part.lr_sum and not _least_lr(plan) <= part.lr_sum <= _most_lr(plan, part):
            return f"its contribution of {part.source!r} has a sum of learning rates, {part.lr_sum}, which its plan's cannot"
        wrong = _wrong_tensor(tensors, _trained(plan, adapters.slice_of(adapter, where)))
        if wrong:
            return wrong
        names = {(part.scope, part.source, name) for name in tensors}
        if seen & names:
            return f"it contributes {min(seen & names)[2]} of {part.source!r} twice"
        seen |= names
    return ""


def spans_of_source(plan: pb.Plan, scope: str, source: str) -> list[Span] | None:
    """The layers that a source trains at the plan's node; None where it has no such source."""
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
    devices = len(plan.serves) if host_mode(plan.host_mode).is_shared(part.scope) else 1
    return devices * plan.steps * plan.batch_size * plan.task.max_tokens


def _least_lr(plan: pb.Plan) -> float:
    """Of one step."""
    return min(plan.optimizer.lrs, default=0.0) * (1 - _ROUNDING)


def _most_lr(plan: pb.Plan, part: pb.Contribution) -> float:
    """Of all steps; a sequential host makes one for each device."""
    times = host_mode(plan.host_mode).steps_of_source(part.scope, len(plan.serves))
    return times * math.fsum(plan.optimizer.lrs) * (1 + _ROUNDING)


def frozen(plan: pb.Plan, name: str) -> bool:
    """Whether a tensor is a factor that the plan's round leaves as it is; carry factors never learn."""
    return is_carry(name) or (plan.lora.freeze_a and name.endswith(A)) or (plan.lora.freeze_b and name.endswith(B))


def _trained(plan: pb.Plan, held: Adapter) -> Adapter:
    """What a node may contribute of what it holds: in its rank, without a frozen factor."""
    return {name: at_rank(name, array, plan.lora.rank) for name, array in held.items() if not frozen(plan, name)}


def _wrong_tensor(tensors: Adapter, expected: Adapter) -> str:
    for name, array in tensors.items():
        if name not in expected:
            return f"its update has a tensor {name}, which its plan does not let it train"
        if array.shape != expected[name].shape or array.dtype != np.float32:
            return f"its {name} is {array.dtype} {array.shape}, not float32 {expected[name].shape}"
        if not np.isfinite(array).all():
            return f"its {name} holds values that are not finite"
    return ""


def broken_sites(layout: Layout, present: Collection[str]) -> dict[str, list[str]]:
    """The sites that lack a host, and who is missing: half of a chain's update fits nothing."""
    missing = {site.name: [host.name for host in site.hosts if host.name not in present] for site in layout.sites}
    return {site: hosts for site, hosts in missing.items() if hosts}


def collect(
    replies: Mapping[str, Reply], plans: Mapping[str, pb.Plan], layout: Layout, broken: Collection[str]
) -> list[Contribution]:
    """One contribution a source and weight, in an order that the replies' order does not change.

    A source is a device with its ends and, with copies, its adapters on hosts; or a site with the layers of its chain. It
    has several weights where fewer devices' labels went through some of its layers. Of a `broken` site nothing counts,
    the ends of its devices included: they were trained against a middle that is lost.
    """
    merged: dict[tuple[str, float, float], Adapter] = {}
    scales: dict[tuple[str, float, float], dict[str, float]] = {}
    for name, reply in sorted(replies.items()):
        for site, one in parts(name, reply, plans[name], layout):
            if site not in broken:
                key = one.source, one.weight, one.lr_sum
                merged.setdefault(key, {}).update(one.tensors)
                scales.setdefault(key, {}).update(one.scales)
    return [
        Contribution(key[0], key[1], tensors, scales[key], key[2]) for key, tensors in sorted(merged.items(), key=_key)
    ]


def parts(name: str, reply: Reply, plan: pb.Plan, layout: Layout) -> Iterator[tuple[str, Contribution]]:
    """What counts of a node's reply, each with the site that it counts with."""
    for part, tensors in zip(reply.report.contributions, reply.tensors, strict=True):
        if part.weight > 0 and tensors:
            of_site = host_mode(plan.host_mode).is_shared(part.scope)
            source = site_source(part.source) if of_site else part.source
            modules = {module_of(tensor) for tensor in tensors if is_factor(tensor)}
            scales = dict.fromkeys(modules, plan.lora.alpha / plan.lora.rank)
            site = layout.site_of(name).name if part.scope == "ends" else plan.site
            yield site, Contribution(source, part.weight, tensors, scales, part.lr_sum)


def _key(item: tuple[tuple[str, float, float], Adapter]) -> tuple[str, float, float]:
    return item[0]


KEPT_NODES = 32  # the most nodes of a round whose replies are kept


def folds(aggregation: Capabilities, nodes: int, kept_nodes: int = KEPT_NODES) -> bool:
    """Returns whether the replies of `nodes` nodes are summed up as they arrive, instead of being kept."""
    return nodes > kept_nodes and aggregation.needs_only_mean


class Fold:
    def __init__(self) -> None:
        self._of_site: dict[str, WeightedMean] = {}
        self._scales: dict[str, float] = {}

    def add(self, parts: Iterable[tuple[str, Contribution]]) -> None:
        """Of one reply, each part with its site."""
        for site, contribution in parts:
            self._of_site.setdefault(site, WeightedMean()).add(contribution)
            self._scales.update(contribution.scales)

    def contributions(self, broken: Collection[str]) -> list[Contribution]:
        """One for all tensors of the same total weight; nothing of the `broken` sites is in them."""
        mean = WeightedMean()
        for site in sorted(self._of_site.keys() - set(broken)):
            mean.merge(self._of_site.pop(site))
        return [Contribution("the mean", weight, tensors, self._scales) for weight, tensors in mean.by_weight()]
