"""The global adapter that a round starts from: each module's factors, and the part that a node takes of them.

If the aggregation takes unequal ranks, a module is kept here in the largest rank of all nodes that have held it, with its
rows in the order of their worth; a node of a smaller rank takes the first rows. Knows nothing about messages.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgelam_fl.errors import RunFailed
from edgelam_fl.model.adapter import (
    PREFIX,
    Adapter,
    Span,
    base_shapes,
    initial_adapter,
    initial_cut,
    joined_digest,
    slice_of,
    tensor_digest,
)
from edgelam_fl.model.carry import is_carry
from edgelam_fl.model.cut import CUT_B
from edgelam_fl.model.lora import LoraKind
from edgelam_fl.plan.layout import site_source
from edgelam_fl.plan.reading import end_spans, hosted_span, is_private, kind_of, spans_of
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
    whole, starts, done = dict(adapter), dict[int, Adapter](), set[tuple[Hashable, ...]]()
    kind = spec.kind
    of_base = base_shapes(spec.source, spec.config.lora.targets, kind)
    for name, plan in plans.items():
        rank = plan.lora.rank
        which = (rank, *spans_of(plan))
        if which in done:
            continue
        done.add(which)
        if rank not in starts:
            starts[rank] = drawn_adapter(spec, kind, rank)
        if any(span.holds(tensor) for tensor in of_base.keys() - whole.keys() for span in spans_of(plan)):
            whole = _of_base(spec, kind) | whole
        for tensor, start in slice_of(starts[rank], spans_of(plan)).items():
            known = whole.setdefault(tensor, start)
            if unequal_ranks and min(known.shape) < min(start.shape):
                whole[tensor] = at_rank(tensor, known, kind.rank_of(_module(tensor), rank), start, rslora=kind.rslora)
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
    return _at_ranks(held, plan)


def _at_ranks(tensors: Adapter, plan: pb.Plan) -> Adapter:
    """Returns tensors in the ranks that they have on the plan's node."""
    kind, rank = kind_of(plan), plan.lora.rank
    return {
        name: at_rank(name, array, kind.rank_of(_module(name), rank), rslora=kind.rslora)
        for name, array in tensors.items()
    }


def _module(name: str) -> str:
    return module_of(name).removeprefix(PREFIX)


def at_rank(
    name: str, array: np.ndarray, rank: int, start: np.ndarray | None = None, *, rslora: bool = False
) -> np.ndarray:
    """Returns a factor in another rank, with the first rows of A or columns of B; any other tensor as it is.

    For a larger rank, A gets the further rows of `start` (which has the new rank), and B columns of zeros. B is scaled by
    new rank / old rank: with s = alpha / rank, s B A keeps its value. `rslora`: s = alpha / sqrt(rank).
    """
    if name.endswith(A) and len(array) != rank:
        return array[:rank] if start is None else np.concatenate([array, start[len(array) :]])
    if name.endswith(B) and array.shape[1] != rank:
        ratio = rank / array.shape[1]
        scaled = array[:, :rank] * np.float32(math.sqrt(ratio) if rslora else ratio)
        return np.pad(scaled, ((0, 0), (0, rank - scaled.shape[1])))
    return array


@dataclass(frozen=True)
class StartingPoint:
    """What a node starts from, with the SHA-256 of each tensor and of all."""

    tensors: Adapter
    frozen: frozenset[str]
    """The tensors that the round does not train."""

    @cached_property
    def digests(self) -> Mapping[str, str]:
        return {name: tensor_digest(name, array) for name, array in self.tensors.items()}

    @cached_property
    def frozen_digests(self) -> Mapping[str, str]:
        return {name: digest for name, digest in self.digests.items() if name in self.frozen}

    @cached_property
    def digest(self) -> str:
        return joined_digest(self.digests)


class StartingPoints:
    """Cuts the nodes' slices out of the adapter that a round starts from: once, however many nodes have the same one.

    A thousand devices with the same layers would else have the same bytes hashed a thousand times.
    """

    def __init__(self, adapter: Adapter, personal: Mapping[str, Adapter] = {}) -> None:
        """`adapter`, `personal`: as of `starting_point`. Their arrays must not change from here on."""
        self.adapter, self.personal = adapter, personal
        self._starts: dict[Hashable, StartingPoint] = {}
        self._shapes: dict[Hashable, dict[str, tuple[int, ...]]] = {}

    def start(self, plan: pb.Plan) -> StartingPoint:
        """Returns the starting point of a plan's node."""
        if self.personal.get(plan.node) or self.personal.get(site_source(plan.site)):
            return self._start(plan)  # nobody else's
        key = (tuple(end_spans(plan)), hosted_span(plan), *_terms(plan))
        if key not in self._starts:
            self._starts[key] = self._start(plan)
        return self._starts[key]

    def _start(self, plan: pb.Plan) -> StartingPoint:
        tensors = starting_point(plan, self.adapter, self.personal)
        return StartingPoint(tensors, frozenset(name for name in tensors if is_frozen(plan, name)))

    def trained_shapes(self, plan: pb.Plan, spans: Sequence[Span], *, ends: bool) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of the tensors that a node may contribute of `spans`, in its rank. `ends`: whether they are its own."""
        key = (tuple(spans), ends, *_terms(plan))
        if key not in self._shapes:
            held = {name: a for name, a in slice_of(self.adapter, spans).items() if not is_frozen(plan, name)}
            sent = {name: array for name, array in held.items() if not (ends and is_private(plan, name))}
            self._shapes[key] = {name: array.shape for name, array in _at_ranks(sent, plan).items()}
        return self._shapes[key]


def _terms(plan: pb.Plan) -> tuple[Hashable, ...]:
    """Returns all of a plan but its layers that a slice depends on."""
    private = plan.routes[0].front if plan.cut.private_front and plan.routes else None, *plan.task.private_modules
    return plan.lora.rank, plan.lora.freeze_a, plan.lora.freeze_b, private


def is_frozen(plan: pb.Plan, name: str) -> bool:
    """Returns whether a tensor is a factor that the round does not train. Carry factors and the cut adapter's B never learn."""
    return (
        is_carry(name)
        or name.endswith(CUT_B)
        or (plan.lora.freeze_a and name.endswith(A))
        or (plan.lora.freeze_b and name.endswith(B))
    )


def as_start(adapter: Adapter, spec: RunSpec, round_: int) -> Start:
    """Returns the global adapter as an aggregation sees it."""
    kind, alpha = spec.kind, spec.config.lora.alpha
    factors = {module_of(name): array for name, array in adapter.items() if name.endswith(A)}
    scales = {module: kind.scale_of(module.removeprefix(PREFIX), len(a_RI), alpha) for module, a_RI in factors.items()}
    return Start(adapter, scales, spec.config.run.seed, round_)


def first_adapter(spec: RunSpec) -> Adapter:
    """Returns the adapter with which a run begins, of the whole model in the run's rank."""
    kind = spec.kind
    return drawn_adapter(spec, kind, spec.config.lora.rank) | _of_base(spec, kind)


def drawn_adapter(spec: RunSpec, kind: LoraKind, rank: int) -> Adapter:
    """Draws the tensors of the whole model that do not begin as what the base has."""
    config = spec.config
    start = initial_adapter(
        spec.source,
        config.lora.targets,
        rank,
        config.run.seed,
        classes=len(config.task.classes),
        values=spec.values,
        kind=kind,
    )
    return start | (initial_cut(spec.source, spec.cut, config.run.seed) if spec.cut else {})


def _of_base(spec: RunSpec, kind: LoraKind) -> Adapter:
    """Returns the tensors that begin as what the base has, in the run's format; with "auto", which each node decides, in fp32."""
    lora, base = spec.config.lora, spec.config.model.base
    if not base_shapes(spec.source, lora.targets, kind):
        return {}
    from edgelam_fl.model.of_base import read_of_base  # its torch takes seconds to import
    from edgelam_fl.model.stage import LoraSettings

    settings = LoraSettings(lora.rank, lora.alpha, lora.targets, kind=kind)
    classes = len(spec.config.task.classes)
    return read_of_base(spec.source, settings, "fp32" if base == "auto" else base, classes=classes, values=spec.values)
