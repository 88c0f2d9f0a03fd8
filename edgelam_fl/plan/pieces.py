"""Decides into how many pieces a batch is cut, how many are under way, and whether activations are kept, where the run file says "auto".

More pieces let links and other nodes work meanwhile, and take less memory; fewer make larger matrices, which a node computes
faster. Decided once per run, by the cost model, from the profiles of the nodes that are there when it begins. Pure functions; they
know nothing of how a step is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from edgelam_fl.config import AUTO, MOST_PIECES, Pieces, RunConfig
from edgelam_fl.errors import DoesNotFit
from edgelam_fl.model.adapter import Span
from edgelam_fl.plan.bases import choose_base
from edgelam_fl.plan.footprint import Footprints
from edgelam_fl.plan.placement import first_proposal, longest_step_s
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.plan.speeds import before_rounds, head_layers, layer_s
from edgelam_fl.telemetry.events import PiecesChosen
from edgelam_fl.wire import edgelam_pb2 as pb

_ALIKE = 1.02  # steps that differ by less are alike, and the fewest pieces win
_MB = 1e6


@dataclass(frozen=True)
class Choice:
    """The pieces that a run is cut into, and why."""

    pieces: Pieces
    steps_s: Mapping[Pieces, float]
    """Predicted seconds of a step with all that were tried and fit."""

    def event(self) -> PiecesChosen:
        """Makes the event of the choice: with the shortest step for each number of micro-batches."""
        shortest: dict[str, float] = {}
        for pieces, step_s in sorted(self.steps_s.items()):
            number = str(pieces.micro_batches)
            shortest[number] = min(shortest.get(number, math.inf), round(step_s, 4))
        return PiecesChosen(
            micro_batches=self.pieces.micro_batches, window=self.pieces.window, checkpointing=self.pieces.checkpointing,
            step_s=round(self.steps_s[self.pieces], 4), steps_s=shortest,
        )  # fmt: skip


def settled(spec: RunSpec, profiles: Sequence[pb.Profile]) -> tuple[RunSpec, Choice | None]:
    """Returns the run with its pieces decided for these nodes, and the choice; None: the run file leaves nothing open. Raises as `choose_pieces`."""
    if not spec.config.has_open_pieces:
        return spec, None
    choice = choose_pieces(spec, profiles)
    return with_pieces(spec, choice.pieces), choice


def with_pieces(spec: RunSpec, pieces: Pieces) -> RunSpec:
    """Returns the run with these pieces in place of what its run file says."""
    split = spec.config.split.model_copy(update=pieces._asdict())
    return replace(spec, config=spec.config.model_copy(update={"split": split}))


def choose_pieces(spec: RunSpec, profiles: Sequence[pb.Profile]) -> Choice:
    """Returns the pieces with the shortest step among those that the run file allows; of several that are alike, the fewest.

    Activations are computed anew only if nothing fits otherwise. Raises DoesNotFit if nothing fits at all, and what
    `first_proposal` raises if nodes are missing.
    """
    problem: DoesNotFit | None = None
    asked = spec.config.split.checkpointing
    for checkpointing in (False, True) if asked == AUTO else (asked,):
        steps_s: dict[Pieces, float] = {}
        for pieces in _allowed(spec.config, checkpointing):
            try:
                steps_s[pieces] = _step_s(with_pieces(spec, pieces), profiles)
            except DoesNotFit as error:
                problem = error  # of the smallest pieces in the end
        if steps_s:
            most_s = _ALIKE * min(steps_s.values())
            return Choice(min(pieces for pieces, step_s in steps_s.items() if step_s <= most_s), steps_s)
    assert problem is not None, "at least one is allowed"
    raise problem


def _allowed(config: RunConfig, checkpointing: bool) -> Iterator[Pieces]:
    """Yields the pieces to try: of open numbers 1, 2, 4 and so on, and the largest."""
    split = config.split
    batch = min(config.federation.batch_size, MOST_PIECES)
    for micro_batches in _doubled(batch) if split.micro_batches == AUTO else [split.micro_batches]:
        under_way = micro_batches if split.hosts else 1  # without hosts, one is computed after the other
        for window in _doubled(under_way) if split.window == AUTO else [split.window]:
            yield Pieces(micro_batches, window, checkpointing)


def _doubled(most: int) -> list[int]:
    return sorted({most, *(1 << power for power in range(most.bit_length()))})


def _step_s(spec: RunSpec, profiles: Sequence[pb.Profile]) -> float:
    """Returns the predicted seconds of a step. If hosts have memory for a smaller window alone, which they grant then, it is that of a step with it."""
    if not spec.config.split.hosts:
        return max((_alone_s(spec, device, profiles) for device in profiles if device.role == pb.DEVICE), default=0.0)
    return longest_step_s(first_proposal(spec, profiles).chains)


def _alone_s(spec: RunSpec, device: pb.Profile, profiles: Sequence[pb.Profile]) -> float:
    """Returns the seconds of a step of a device that trains the whole model. Raises DoesNotFit if it has too little memory."""
    footprints, pieces, layers = Footprints(spec), spec.config.pieces, spec.source.num_layers
    spans = [Span(0, layers, embed=True, head=True)]
    pair = "/".join(choose_base(spec, device, spans))
    free_bytes = device.memory_available_bytes or math.inf
    short = footprints.of_device(device.name, spans, pair, pieces.window) + footprints.growth_bytes - free_bytes
    if short > 0:
        raise DoesNotFit(
            f"device {device.name} trains the whole model: {short / _MB:.0f} MB more than its {free_bytes / _MB:.0f} MB of free memory",
            short,
        )
    unit_s = (layers + head_layers(spec)) * layer_s(spec, before_rounds(spec.config), device, pair, profiles)
    return pieces.micro_batches * unit_s
