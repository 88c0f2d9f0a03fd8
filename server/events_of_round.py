"""Makes the events `PlanMade`, `RoundDone` and `RoundTimeline` of a round's plan and its nodes' reports."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from edgelam_fl.plan.fronts import host_readings_at
from edgelam_fl.plan.layout import Site
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.metrics import means_of
from edgelam_fl.tasks.points import points_of
from edgelam_fl.telemetry.events import (
    DemandSeen,
    DeviceLeftOut,
    DeviceResult,
    HostResult,
    LayersHeld,
    NodePicture,
    PlanMade,
    RoutePicture,
    SitePicture,
    StepLeftOut,
    TextReadable,
    TimelineInterval,
)
from edgelam_fl.telemetry.events.rounds import mean_of
from edgelam_fl.telemetry.measures import MEASURES
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BY_RELAY
from server.replies import Reply
from server.state import PlannedRound

_INTERVALS = 1000  # the most per node and round; a node sends a few hundred


def describe_plan(planned: PlannedRound, num_layers: int, personal: bool) -> PlanMade:
    """Makes the event of a plan. `personal`: whether sources may go on with tensors of their own."""
    lineup, layout = planned.lineup, planned.layout
    demands = None
    if lineup.demands is not None:  # for `server.virtual.replay`
        demands = {
            demand.name: DemandSeen(payload_bytes=demand.payload_bytes, compute_s=demand.compute_s, snr=demand.snr)
            for demand in lineup.demands
        }
    return PlanMade(
        round=planned.facts.round,
        attempt=planned.facts.attempt,
        selected=tuple(lineup.selected.names),
        why=dict(lineup.selected.why),
        shares=lineup.shares,
        routes=tuple(_route(route, num_layers) for route in layout.routes.values()),
        sites=tuple(_site(site) for site in layout.sites if site.hosts),
        nodes={
            name: NodePicture(base=plan.model.base, compute=plan.model.compute, rank=plan.lora.rank)
            for name, plan in planned.plans.items()
        },
        personal=personal,
        demands=demands,
        unfit=lineup.unfit or None,
        first_step=max((plan.first_step for plan in planned.plans.values()), default=0),
    )


def describe_readable(number: int, routes: Iterable[pb.Route], spec: RunSpec) -> TextReadable | None:
    """Makes the event of what hosts can read, for the device that keeps the fewest layers in front; None without hosts."""
    ends = {(route.front, spec.source.num_layers - route.back_first) for route in routes if route.hops}
    found = host_readings_at(spec.config, spec.source.leakage_key, ends)
    if not found:
        return None
    least = found[0]
    return TextReadable(
        round=number, front=least.front, back=least.back, text=least.text, labels=least.labels, words=least.words()
    )


def describe_round(
    received_bytes: Mapping[str, int],
    started_from: Mapping[str, str],
    replies: Mapping[str, Reply],
    measure: str = "perplexity",
) -> tuple[tuple[DeviceResult, ...], tuple[HostResult, ...], dict[str, int]]:
    """Returns (devices, hosts, bytes by kind) of `RoundDone`; a device that is a host is in both.

    `received_bytes`: of the tensors that each node was sent. `started_from`: the digest of the adapter in each node's plan. `measure`: the
    task's, by its name in `MEASURES`.
    """
    devices, hosts, by_kind = list[DeviceResult](), list[HostResult](), Counter[str]()
    for name, reply in sorted(replies.items()):
        report, received = reply.report, received_bytes.get(name, 0)
        common: dict[str, Any] = {
            "name": name,
            "peak_rss_bytes": report.peak_rss_bytes,
            "celsius": round(report.celsius, 1) or None,
            "slowed": report.slowed,
            "moments": report.moments,
            "digest_before": started_from.get(name, ""),
            "digest_after": report.adapter_digest,
        }
        if report.role == pb.DEVICE:
            traffic = _traffic(report.bytes, reply.bytes_of("ends"), received)
            devices.append(_device(report, {**common, **traffic}, measure))
            for count in report.bytes:
                by_kind[count.kind] += count.payload_bytes + count.framing_bytes
            received = 0  # one message for both parts: counted once
        if report.HasField("host"):
            host = report.host
            traffic = _traffic(host.bytes, reply.bytes_of("site"), received)
            layers, seconds = (host.first_layer, host.last_layer), round(host.compute_seconds, 3)
            left_out = tuple(
                DeviceLeftOut(device=one.device, steps=one.steps, reason=one.reason, out=one.out)
                for one in host.left_out
            )
            hosts.append(HostResult(**common, **traffic, compute_seconds=seconds, layers=layers, left_out=left_out))
    return tuple(devices), tuple(hosts), dict(by_kind)


def describe_timeline(replies: Mapping[str, Reply]) -> dict[str, tuple[TimelineInterval, ...]]:
    """Returns the intervals of each node. Nodes that sent no intervals are left out."""
    return {
        name: tuple(
            TimelineInterval(
                i.kind,
                i.role,
                _finite(round(i.start_s, 6)),
                _finite(round(i.seconds, 6)),
                i.step,
                i.micro_batch,
                i.peer,
            )
            for i in reply.report.timeline[-_INTERVALS:]
        )
        for name, reply in sorted(replies.items())
        if reply.report.timeline
    }


def _route(route: pb.Route, num_layers: int) -> RoutePicture:
    return RoutePicture(
        device=route.device,
        front=route.front,
        back_first=route.back_first,
        num_layers=num_layers,
        hops=tuple(LayersHeld(node=hop.node, first=hop.first, last=hop.last) for hop in route.hops),
    )


def _site(site: Site) -> SitePicture:
    return SitePicture(
        site=site.name,
        hosts=tuple(LayersHeld(node=host.name, first=host.first, last=host.last) for host in site.hosts),
        devices=tuple(site.members),
    )


def _device(report: pb.JobReport, common: Mapping[str, Any], measure: str) -> DeviceResult:
    """Makes a device's part of the event. `common`: the fields that hosts have too."""
    points = points_of(report.eval_sums) if MEASURES[measure].over else ()
    counted = [step for step in report.steps if step.counted]
    labels = sum(step.labels for step in counted)
    return DeviceResult(
        **common,
        compute_seconds=round(report.compute_seconds, 3),
        examples=report.examples,
        held_out=report.held_out,
        bad=report.data.bad,
        skipped=report.data.skipped,
        cut=report.data.cut,
        cut_answers=report.data.cut_answers,
        unread_fields=report.data.unread,
        unmeasured=report.data.unmeasured,
        labels=report.labels_trained,
        loss=_finite(sum(step.loss_sum for step in counted) / labels) if labels else None,
        perplexity=None if MEASURES[measure].over else _perplexity(report),
        metrics=_metrics(report) | ({measure: mean_of(point for point in points if not point.who)} if points else {}),
        tokens=report.tokens_trained,
        train_seconds=round(report.train_seconds, 3),
        eval_seconds=round(report.eval_seconds, 3),
        step_losses=tuple(
            _finite(round(step.loss_sum / step.labels, 5)) if step.labels else None for step in report.steps
        ),
        left_out=tuple(StepLeftOut(step=step.step, reason=step.reason) for step in report.steps if not step.counted),
        held_out_labels=report.eval_labels or None,
        points=points,
    )


def _metrics(report: pb.JobReport) -> dict[str, float | None]:
    found = means_of(report.eval_sums)
    if "correct" in report.eval_sums and report.eval_labels:
        found["accuracy"] = report.eval_sums["correct"] / report.eval_labels
    return {name: _finite(value) for name, value in found.items()}


def _traffic(counts: Iterable[pb.KindBytes], sent_bytes: int, received_bytes: int) -> dict[str, Any]:
    total = Counter[str]()
    for count in counts:
        total[count.direction] += count.payload_bytes + count.framing_bytes
        if count.link.endswith(BY_RELAY):
            total["relayed"] += count.payload_bytes + count.framing_bytes
    return {
        "bytes_up": total["sent"],
        "bytes_down": total["received"],
        "bytes_relayed": total["relayed"],
        "adapter_bytes_up": sent_bytes,
        "adapter_bytes_down": received_bytes,
    }


def _finite(value: float) -> float | None:
    """Returns None for a diverged number: JSON has no infinity."""
    return value if math.isfinite(value) else None


def _perplexity(report: pb.JobReport) -> float | None:
    loss = report.eval_loss_sum / report.eval_labels if report.eval_labels else math.inf
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None
