"""The adapter that a round starts from: one tensor a module for all, and what each node takes of it."""

from __future__ import annotations

from collections.abc import Mapping

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Adapter, initial_adapter, slice_of
from edgelam_fl.model.source import ModelSource
from edgelam_fl.split.plan import end_spans, hosted_span, spans_of
from edgelam_fl.wire import edgelam_pb2 as pb
from server.layout import site_source


def complete(adapter: Adapter, plans: Mapping[str, pb.Plan], config: RunConfig, source: ModelSource) -> Adapter:
    """`adapter` with the start of each module that it lacks, in the rank of those that hold it.

    Raises RunFailed where a module was trained with another rank than its holders have now.
    """
    whole, starts = dict(adapter), dict[int, Adapter]()
    for name, plan in plans.items():
        rank = plan.lora.rank
        if rank not in starts:
            starts[rank] = _start(config, source, rank)
        for tensor, start in slice_of(starts[rank], spans_of(plan)).items():
            known = whole.setdefault(tensor, start)
            if known.shape != start.shape:
                raise RunFailed(
                    f"{tensor} was trained as {list(known.shape)}; node {name}, which holds it now, has rank {rank} "
                    f"(lora.ranks): give all that may hold a layer the same rank"
                )
    return whole


def starting_point(plan: pb.Plan, adapter: Adapter, personal: Mapping[str, Adapter]) -> Adapter:
    """What the plan's node starts from: of the `adapter` what it holds, but for what its source goes on with alone."""
    hosted = hosted_span(plan)
    of_site = slice_of({**adapter, **personal.get(site_source(plan.site), {})}, [hosted]) if hosted is not None else {}
    return of_site | slice_of({**adapter, **personal.get(plan.node, {})}, end_spans(plan))


def _start(config: RunConfig, source: ModelSource, rank: int) -> Adapter:
    return initial_adapter(source, config.lora.targets, rank, config.run.seed, classes=len(config.task.classes))
