"""The rounds of a run in virtual time, as another bandwidth strategy would have made them.

What a round learns does not depend on how the band was shared out, so one run for each selection is enough. (A selection
that remembers how long rounds took might have chosen others under other shares; here the recorded choice stands.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.wireless.rounds import recorded_device_round, virtual_round
from server.schedule import check_shares
from strategies.api import Demand
from strategies.registry import load


def replay(events: Iterable[Mapping[str, Any]], config: RunConfig, bandwidth: str) -> list[dict[str, Any]]:
    """The field `virtual` of each training round, with the shares of the strategy `bandwidth`.

    `events` of a run with `[wireless]`, and its run file. The strategy sees what the run's own saw before each round; it is not
    told what became of it. Raises ConfigError for an unknown strategy, RunFailed for shares that cannot be used.
    """
    strategy = config.strategy.model_copy(update={"bandwidth": bandwidth})
    config = config.model_copy(update={"strategy": strategy})
    allocator = load("bandwidth", bandwidth, strategy.options).rule
    rounds, demands = [], list[Demand]()
    for event in events:
        if event.get("event") == "plan":
            demands = [Demand(name, **facts) for name, facts in (event.get("demands") or {}).items()]
        elif event.get("event") == "round_done" and event.get("virtual"):
            shares = allocator.allocate(demands, config.wireless.bandwidth_hz)
            check_shares(config, shares, {demand.name for demand in demands})
            virtual = event["virtual"]
            parts = {name: recorded_device_round(device) for name, device in virtual["devices"].items()}
            rounds.append(virtual_round(config.wireless, parts, shares, virtual["dropped"]))
    return rounds
