"""Chooses the devices with the fastest links; devices never measured come first, so that they get measured."""

from __future__ import annotations

import math

from strategies.api import Candidate, RoundState, Selected, Selection
from strategies.selection.ranking import take


class BestChannel(Selection):
    def select(self, state: RoundState) -> Selected:
        order = sorted(state.candidates, key=lambda candidate: (-_quality(candidate), candidate.name))
        return take(order, state.at_most(), _reason)


def _quality(candidate: Candidate) -> float:
    """Returns the signal-to-noise ratio of a wireless channel, else the rate of a link: no federation has both."""
    if candidate.snr is not None:
        return candidate.snr
    return math.inf if candidate.rate_bps is None else candidate.rate_bps


def _reason(candidate: Candidate) -> str:
    if candidate.snr is not None:
        return f"signal-to-noise ratio {candidate.snr:.3g}"
    return "link never measured" if candidate.rate_bps is None else f"link of {candidate.rate_bps / 1e6:.3g} Mbit/s"
