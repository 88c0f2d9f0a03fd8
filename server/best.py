"""The best adapter of a run so far, by its held-out loss, and how long a run has gone on without a better one.

A round's adapter is measured at the start of the next round, by the devices that are in that round. Knows neither nodes nor
plans. As transformers' Trainer has it: every lower loss is the best so far, and patience ends with evaluations whose loss is not
lower than the best by more than a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.telemetry.events import StoppedEarly
from edgelam_fl.wire import edgelam_pb2 as pb

if TYPE_CHECKING:
    from server.state import FederationState


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best of a run's evaluations so far."""

    round: int
    """The round whose adapter had the lowest loss; 0: what the run started from."""
    loss: float
    """Held-out loss per label, in nats or in the unit of a task of values; infinite if no evaluation gave a finite one."""
    in_vain: int = 0
    """Evaluations in a row that were not better by more than the threshold."""
    adapter: Adapter = field(default_factory=dict)
    """The best adapter; empty unless the run asks for it at its end."""
    exports: Mapping[str, Adapter] = field(default_factory=dict)
    """Per device, its own tensors beside it."""

    @property
    def finite_loss(self) -> float | None:
        """The loss; None if it is infinite."""
        return self.loss if math.isfinite(self.loss) else None


def held_out_loss(reports: Iterable[pb.JobReport]) -> float | None:
    """Returns the mean loss per held-out label over all devices, in nats or in the unit of a task of values; None if nothing was measured."""
    labels, total = 0, 0.0
    for report in reports:
        labels, total = labels + report.eval_labels, total + report.eval_loss_sum
    return total / labels if labels else None


def best_after(best: Best | None, measured: Best, threshold: float) -> Best:
    """Returns the best of what was known and of an adapter that has just been measured. `best`: None before the first evaluation."""
    found = measured if math.isfinite(measured.loss) else replace(measured, loss=math.inf)
    if best is None:
        return found
    in_vain = 0 if found.loss < best.loss - threshold else best.in_vain + 1
    return replace(found if found.loss < best.loss else best, in_vain=in_vain)


def best_with(state: FederationState, reports: Iterable[pb.JobReport], config: RunConfig) -> Best | None:
    """Returns what a run's evaluations have shown, with that of the adapter of `state`, which the reports measure."""
    loss = held_out_loss(reports)
    if loss is None:
        return state.best
    measured = Best(round=state.round, loss=loss)
    if config.federation.load_best:
        measured = replace(measured, adapter=state.adapter, exports=state.exports())
    return best_after(state.best, measured, config.federation.early_stopping_threshold)


def stopped_early(state: FederationState, config: RunConfig) -> StoppedEarly | None:
    """Returns what is to be said if the run's patience has ended; None if it goes on."""
    patience, best = config.federation.early_stopping_patience, state.best
    if not patience or best is None or best.in_vain < patience:
        return None
    return StoppedEarly(
        round=state.round,
        planned=config.federation.rounds,
        evaluations=best.in_vain,
        best_round=best.round,
        best_loss=best.finite_loss,
    )


def check_is_measured(config: RunConfig, held_out: Iterable[int]) -> None:
    """Raises ConfigError if the run file lets held-out losses decide, and no device holds examples out. held_out: how many each does."""
    federation = config.federation
    patience = federation.early_stopping_patience
    if not (patience or federation.load_best) or any(held_out):
        return
    key = f"early_stopping_patience = {patience}" if patience else "load_best = true"
    raise ConfigError(
        f"federation.{key} needs held-out losses, and no device holds examples out. Allowed: data.held_out above 0 (it is "
        f"{config.data.held_out:g}), or devices with `edgelam client --eval-data FILE`"
    )
