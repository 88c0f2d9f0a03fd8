"""What a plan says about its node: the names of its job, and the layers that it holds. Imports no torch.

Read by the server, which slices adapters with it, and by the stage host, which loads these slices.
"""

from __future__ import annotations

from edgelam_fl.model.adapter import Span
from edgelam_fl.wire import edgelam_pb2 as pb


def job_id(plan: pb.Plan) -> str:
    """The round's attempt, the same at all nodes: what HELLO carries."""
    return f"{plan.run}/{plan.round}/{plan.attempt}"


def part_id(plan: pb.Plan, node: str = "") -> str:
    """A node's part in it, this one's by default: what Submit and Wait name, and what a relay joins links for."""
    return f"{job_id(plan)}/{node or plan.node}"


def end_spans(plan: pb.Plan) -> list[Span]:
    """What a device holds of its own route, in the route's order; nothing on an edge server."""
    if not plan.routes:
        return []
    route, layers = plan.routes[0], plan.model.num_layers
    if not route.hops:
        return [Span(0, layers, embed=True, head=True)]
    front = Span(0, route.front, embed=True)
    if plan.labels == "last-stage":
        return [front]
    return [front, Span(route.back_first, layers, head=True)]


def hosted_span(plan: pb.Plan) -> Span | None:
    """What the node holds for the routes that cross it; None where it is no host."""
    if not plan.serves:
        return None
    last = plan.serves[0].hops[-1].node == plan.node
    return Span(plan.hosted.first, plan.hosted.last, head=last and plan.labels == "last-stage")


def spans_of(plan: pb.Plan) -> list[Span]:
    """All that the node holds: its own ends, then what it hosts."""
    hosted = hosted_span(plan)
    return end_spans(plan) + ([hosted] if hosted is not None else [])
