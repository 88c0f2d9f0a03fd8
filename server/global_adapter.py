"""The adapter that a round starts from: one tensor a module for all, and what each node takes of it.

Where an aggregation takes unequal ranks, a module stands here in the largest rank of those who have held it, with its
rows in the order of their worth, and a node gets the first ones, in its own rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Adapter, initial_adapter, slice_of
from edgelam_fl.plan.layout import site_source
from edgelam_fl.plan.reading import end_spans, hosted_span, spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from strategies.aggregation.factors import A, B, module_of
from strategies.api import Start


def complete(adapter: Adapter, plans: Mapping[str, pb.Plan], spec: RunSpec, unequal_ranks: bool = False) -> Adapter:
    """`adapter` with the start of each module that it lacks, in the rank of those that hold it.

    With `unequal_ranks`, in the largest of them. Else raises RunFailed where a module was trained with another rank than
    its holders have now.
    """
    whole, starts = dict(adapter), dict[int, Adapter]()
    for name, plan in plans.items():
        rank = plan.lora.rank
        if rank not in starts:
            starts[rank] = _start(spec, rank)
        for tensor, start in slice_of(starts[rank], spans_of(plan)).items():
            known = whole.setdefault(tensor, start)
            if unequal_ranks and min(known.shape) < min(start.shape):
                whole[tensor] = at_rank(tensor, known, rank, start)
            if not unequal_ranks and known.shape != start.shape:
                raise RunFailed(
                    f"{tensor} was trained as {list(known.shape)}; node {name}, which holds it now, has rank {rank} "
                    f"(lora.ranks): give all that may hold a layer the same rank"
                )
    return whole


def starting_point(plan: pb.Plan, adapter: Adapter, personal: Mapping[str, Adapter]) -> Adapter:
    """What the plan's node starts from: of the `adapter` what it holds, but for what its source goes on with alone."""
    hosted = hosted_span(plan)
    of_site = slice_of({**adapter, **personal.get(site_source(plan.site), {})}, [hosted]) if hosted is not None else {}
    held = of_site | slice_of({**adapter, **personal.get(plan.node, {})}, end_spans(plan))
    return {name: at_rank(name, array, plan.lora.rank) for name, array in held.items()}


def at_rank(name: str, array: np.ndarray, rank: int, start: np.ndarray | None = None) -> np.ndarray:
    """A tensor in another rank: the first rows of A and columns of B, or more of them; not a factor: as it is.

    More rows are those of `start` (in the new rank), more columns zero. B is scaled by new rank / old, so that s B A stays
    what it is with s = alpha / rank.
    """
    if name.endswith(A) and len(array) != rank:
        return array[:rank] if start is None else np.concatenate([array, start[len(array) :]])
    if name.endswith(B) and array.shape[1] != rank:
        scaled = array[:, :rank] * np.float32(rank / array.shape[1])
        return np.pad(scaled, ((0, 0), (0, rank - scaled.shape[1])))
    return array


def as_start(adapter: Adapter, config: RunConfig, round_: int) -> Start:
    """The global adapter as an aggregation sees it."""
    factors = {module_of(name): array for name, array in adapter.items() if name.endswith(A)}
    scales = {module: config.lora.alpha / len(a_RI) for module, a_RI in factors.items()}
    return Start(adapter, scales, config.run.seed, round_)


def _start(spec: RunSpec, rank: int) -> Adapter:
    config = spec.config
    return initial_adapter(spec.source, config.lora.targets, rank, config.run.seed, classes=len(config.task.classes))
