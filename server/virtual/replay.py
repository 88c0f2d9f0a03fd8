"""Replays the rounds of a run in virtual time under another bandwidth strategy.

What a round learns does not depend on how the band was shared, so one run per selection is enough. (A selection that
remembers how long rounds took might have chosen other devices under other shares; the recorded choice is kept here.)
"""

from __future__ import annotations

from collections.abc import Iterable

from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds
from edgelam_fl.config import RunConfig
from edgelam_fl.telemetry.events import Event, PlanMade, RoundDone, VirtualRound
from edgelam_fl.wireless.rounds import recorded_device_round, virtual_round
from server.schedule import check_shares
from strategies.api import Demand
from strategies.registry import load


def replay(
    events: Iterable[Event], config: RunConfig, bandwidth: str, bounds: Bounds = DEFAULT_BOUNDS
) -> list[VirtualRound]:
    """Returns the field `virtual` of each training round, with the shares of the strategy `bandwidth`.

    `events`, `config`: of a run with `[wireless]`. `bounds`: the modules that the strategy may come from. The strategy sees what the run's own strategy saw before each round, and
    observes no outcome. Raises ConfigError for an unknown strategy, RunFailed for shares that cannot be used.
    """
    strategy = config.strategy.model_copy(update={"bandwidth": bandwidth})
    config = config.model_copy(update={"strategy": strategy})
    allocator = load("bandwidth", bandwidth, strategy.options, bounds).rule
    rounds, demands = [], list[Demand]()
    for event in events:
        if isinstance(event, PlanMade):
            seen = event.demands or {}
            demands = [Demand(name, of.payload_bytes, of.compute_s, snr=of.snr) for name, of in seen.items()]
        elif isinstance(event, RoundDone) and event.virtual is not None:
            shares = allocator.allocate(demands, config.wireless.bandwidth_hz)
            check_shares(config, shares, {demand.name for demand in demands})
            parts = {name: recorded_device_round(device) for name, device in event.virtual.devices.items()}
            rounds.append(virtual_round(config.wireless, parts, shares, event.virtual.dropped))
    return rounds
