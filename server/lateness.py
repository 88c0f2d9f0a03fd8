"""When a device is late, so that a round goes on without it: after a fixed time, by what rounds took, or by what was predicted.

Knows nothing about how a late device is told, nor what becomes of its update (`server.late_updates`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from edgelam_fl.config import RunConfig
from strategies.api import Candidate

_MESSAGES_S = 10.0  # of a round are Flower's, which no measurement of a device contains
_LEAST_GRACE_S, _GRACE_SHARE = 5.0, 0.1  # for devices that are nearly through when enough others are


@dataclass(frozen=True, slots=True, kw_only=True)
class Lateness:
    """The rule of one attempt. Times are seconds since the attempt began."""

    least: int
    """Devices that must have delivered before any other can be late."""
    limit_s: float = math.inf
    """When a device is late."""
    rule: str = ""
    """What the limit comes from, in words."""
    enough: int = 0
    """Devices whose delivery makes all others late, soon after; 0: none."""

    def why_late(self, delivered_s: Sequence[float], now_s: float) -> str:
        """Returns why all devices that have not delivered by now are late; empty: they are not. `delivered_s`: when others did."""
        if len(delivered_s) < self.least:
            return ""
        if now_s >= self.limit_s:
            return f"later than {self.limit_s:.0f} s ({self.rule})"
        if self.enough and len(delivered_s) >= self.enough:
            when_s = sorted(delivered_s)[self.enough - 1]
            if now_s >= when_s + max(_LEAST_GRACE_S, _GRACE_SHARE * when_s):
                return f"later than {self.enough} other devices (federation.enough_nodes)"
        return ""


def lateness(config: RunConfig, devices: Sequence[Candidate]) -> Lateness:
    """Returns the rule for an attempt of these devices. Until something was measured, nobody is late by a limit."""
    federation = config.federation
    limit_s, what = math.inf, ""
    if federation.deadline == "percentile":
        limit_s, what = (
            _percentile(devices, federation.deadline_percentile),
            f"{federation.deadline_percentile:g}th percentile",
        )
    elif federation.deadline == "predicted":
        limit_s, what = _predicted(devices), "predicted time"
    return Lateness(
        least=max(1, federation.min_nodes),
        limit_s=federation.deadline_factor * limit_s + _MESSAGES_S,
        rule=f"federation.deadline: {federation.deadline_factor:g} times the {what}",
        enough=federation.enough_nodes,
    )


def _percentile(devices: Iterable[Candidate], percentile: float) -> float:
    known = [device.last_seconds for device in devices if device.last_seconds]
    return float(np.percentile(known, percentile)) if known else math.inf


def _predicted(devices: Sequence[Candidate]) -> float:
    """Returns the longest time that any of the devices needs, from its bytes, its rate and its compute.

    Nothing of that contains the waits for others, so all is scaled by how much longer their last rounds took.
    """
    rates = [device.rate_bps for device in devices if device.rate_bps]
    usual_bps = median(rates) if rates else math.inf  # of a device that sends nothing, compute is all
    bare_s = {d.name: d.compute_s + 8 * d.payload_bytes / (d.rate_bps or usual_bps) for d in devices}
    ratios = [d.last_seconds / bare_s[d.name] for d in devices if d.last_seconds and bare_s[d.name]]
    return max(bare_s.values()) * median(ratios) if ratios else math.inf
