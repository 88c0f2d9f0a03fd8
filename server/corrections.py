"""What an aggregation adds to gradients, cut for each source that a plan's node has. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from edgelam_fl.model import adapter as adapters
from edgelam_fl.plan.layout import site_source
from edgelam_fl.plan.modes import host_mode
from edgelam_fl.wire import edgelam_pb2 as pb
from server.replies import frozen, spans_of_source
from strategies.registry import Capabilities


def add_corrections(
    plan: pb.Plan, aggregation: Capabilities, adapter: Mapping[str, np.ndarray]
) -> list[adapters.Adapter]:
    """Names them in the plan, and returns their tensors in that order. `adapter`: the global one, for the names."""
    if not (plan.steps and aggregation.corrects_sgd):
        return []
    found = []
    for scope, source in _sources(plan):
        held = adapters.slice_of(adapter, spans_of_source(plan, scope, source) or [])
        as_seen = site_source(source) if host_mode(plan.host_mode).is_shared(scope) else source
        tensors = dict(aggregation.correction(as_seen, [name for name in held if not frozen(plan, name)]))
        if tensors:
            plan.corrections.add(scope=scope, source=source, digest=adapters.digest(tensors))
            found.append(tensors)
    return found


def _sources(plan: pb.Plan) -> Iterator[tuple[str, str]]:
    if plan.routes:
        yield "ends", plan.node
    if plan.serves:
        devices = [route.device for route in plan.serves]
        yield from (("site", source) for source in host_mode(plan.host_mode).sources(plan.site, devices))
