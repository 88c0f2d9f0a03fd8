"""Corrections: tensors beside a plan that an aggregation adds to the gradients of a node's sources for one round.

They do not belong to an adapter, nor count in its digest. Knows nothing about what they mean
(`strategies.aggregation.scaffold` does).
"""

from __future__ import annotations

from collections.abc import Sequence

from edgelam_fl.errors import Refused
from edgelam_fl.model import adapter as adapters
from edgelam_fl.wire import edgelam_pb2 as pb


def read_corrections(plan: pb.Plan, given: Sequence[bytes]) -> dict[tuple[str, str], adapters.Adapter]:
    """Returns the corrections by scope and source. Raises Refused if they are not those that the plan names."""
    if len(given) != len(plan.corrections):
        raise Refused(f"node {plan.node} got {len(given)} corrections; its plan names {len(plan.corrections)}")
    found: dict[tuple[str, str], adapters.Adapter] = {}
    for named, data in zip(plan.corrections, given, strict=True):
        tensors = found[named.scope, named.source] = adapters.from_bytes(data)
        digest = adapters.digest(tensors)
        if digest != named.digest:
            raise Refused(
                f"node {plan.node} got correction {digest[:12]} of {named.source!r}, its plan names {named.digest[:12]}"
            )
    return found
