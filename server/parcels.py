"""The tensors that a round sends to each node: the part of its starting point that it lacks, and its corrections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord

from edgelam_fl.flower import to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.plan.layout import site_source
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.wire import edgelam_pb2 as pb
from server.global_adapter import StartingPoints, is_frozen
from server.holdings import Holdings, NodeHoldings
from server.replies import spans_of_source
from server.state import Parcel, PlannedRound
from strategies.registry import Capabilities


def make_parcels(
    plans: Mapping[str, pb.Plan],
    holdings: Holdings,
    starts: StartingPoints,
    aggregation: Capabilities,
    lent: Mapping[str, bytes] = {},
) -> dict[str, Parcel]:
    """Returns the parcel of each node. Completes the plans: with the digest of each starting point, and the corrections.

    Nodes that are sent the same tensors share one record. `holdings`: what the nodes are known to hold. `starts`: of the adapter that
    the round starts from. `lent`: by node, the snapshot of the host whose place it takes.
    """
    records: dict[tuple[str, frozenset[str]], ArrayRecord] = {}
    parcels = {}
    for name, plan in plans.items():
        needed = starts.start(plan)
        plan.adapter_digest = needed.digest
        corrections = tuple(map(to_record, add_corrections(plan, aggregation, starts.adapter)))
        lacking = holdings.lacking(name, needed)
        if lacking is None:
            parcels[name] = Parcel(None, corrections, lent.get(name, b""))
            continue
        which = plan.adapter_digest, frozenset(lacking)
        if which not in records:
            records[which] = to_record(lacking)
        parcels[name] = Parcel(records[which], corrections, lent.get(name, b""))
    return parcels


def parcel_of(planned: PlannedRound, name: str, report: pb.JobReport) -> Parcel:
    """Returns what a node needs that answered its plan with a report of state "needs": all that differs from what it holds.

    `report`: says which tensors the node holds. Nothing else is known of it, whatever its earlier replies said.
    """
    plan = planned.plans[name]
    held = NodeHoldings("", {tensor: digest.hex() for tensor, digest in report.held.items()})
    lacking = Holdings({name: held}).lacking(name, planned.starts.start(plan))
    return replace(planned.parcels[name], adapter=to_record(lacking or {}))


def add_corrections(
    plan: pb.Plan, aggregation: Capabilities, adapter: Mapping[str, np.ndarray]
) -> list[adapters.Adapter]:
    """Names the node's corrections in its plan: what the aggregation adds to the gradients of each source. Returns their tensors.

    One adapter per correction, in the plan's order; none without training, or if the aggregation does not correct.
    `adapter`: the global one, for the names of the tensors.
    """
    if not (plan.steps and aggregation.corrects_sgd):
        return []
    found = []
    for scope, source in _sources(plan):
        held = adapters.slice_of(adapter, spans_of_source(plan, scope, source) or [])
        as_seen = site_source(source) if host_mode(plan.host_mode).is_shared(scope) else source
        tensors = dict(aggregation.correction(as_seen, [name for name in held if not is_frozen(plan, name)]))
        if tensors:
            plan.corrections.add(scope=scope, source=source, digest=adapters.digest(tensors))
            found.append(tensors)
    return found


def _sources(plan: pb.Plan) -> Iterator[tuple[str, str]]:
    """Yields (scope, source) of everything that the plan's node trains."""
    if plan.routes:
        yield "ends", plan.node
    if plan.serves:
        devices = [route.device for route in plan.serves]
        yield from (("site", source) for source in host_mode(plan.host_mode).sources(plan.site, devices))
