"""The global adapter that a round starts from: each module's factors, and the part that a node takes of them.

If the aggregation takes unequal ranks, a module is kept here in the largest rank of all nodes that have held it, with its
rows in the order of their worth; a node of a smaller rank takes the first rows. Knows nothing about messages.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import Adapter, initial_adapter, initial_cut, slice_of
from edgelam_fl.plan.layout import site_source
from edgelam_fl.plan.reading import end_spans, hosted_span, is_private, spans_of
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.wire import edgelam_pb2 as pb
from strategies.aggregation.factors import A, B, module_of
from strategies.api import Start


def with_missing_modules(
    adapter: Adapter, plans: Mapping[str, pb.Plan], spec: RunSpec, unequal_ranks: bool = False
) -> Adapter:
    """Returns `adapter` and the initial values of each module that it lacks, in the rank of the nodes that hold the module.

    With `unequal_ranks`, that is the largest of their ranks; without, raises RunFailed if a module was trained in another
    rank than its holders have now.
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
    """Returns the tensors that the plan's node starts from: its slice of the `adapter`, and the `personal` tensors of its
    sources in place of the global ones. A private front starts from what its device has.
    """
    hosted = hosted_span(plan)
    of_site = slice_of({**adapter, **personal.get(site_source(plan.site), {})}, [hosted]) if hosted is not None else {}
    own = slice_of({**adapter, **personal.get(plan.node, {})}, end_spans(plan))
    held = of_site | {name: array for name, array in own.items() if not is_private(plan, name)}
    return {name: at_rank(name, array, plan.lora.rank) for name, array in held.items()}


def at_rank(name: str, array: np.ndarray, rank: int, start: np.ndarray | None = None) -> np.ndarray:
    """Returns a factor in another rank, with the first rows of A or columns of B; any other tensor as it is.

    For a larger rank, A gets the further rows of `start` (which has the new rank), and B columns of zeros. B is scaled by
    new rank / old rank: with s = alpha / rank, s B A keeps its value.
    """
    if name.endswith(A) and len(array) != rank:
        return array[:rank] if start is None else np.concatenate([array, start[len(array) :]])
    if name.endswith(B) and array.shape[1] != rank:
        scaled = array[:, :rank] * np.float32(rank / array.shape[1])
        return np.pad(scaled, ((0, 0), (0, rank - scaled.shape[1])))
    return array


def as_start(adapter: Adapter, config: RunConfig, round_: int) -> Start:
    """Returns the global adapter as an aggregation sees it."""
    factors = {module_of(name): array for name, array in adapter.items() if name.endswith(A)}
    scales = {module: config.lora.alpha / len(a_RI) for module, a_RI in factors.items()}
    return Start(adapter, scales, config.run.seed, round_)


def _start(spec: RunSpec, rank: int) -> Adapter:
    config = spec.config
    start = initial_adapter(spec.source, config.lora.targets, rank, config.run.seed, classes=len(config.task.classes))
    return start | (initial_cut(spec.source, spec.cut, config.run.seed) if spec.cut else {})
