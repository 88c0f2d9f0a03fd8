"""Poisson selection: each device takes part by a coin of its own, so that a round may have any number of devices, also none.

The selection that differential privacy can count on: what a round gives away of a device is less if nobody knows whether the
device was in it (amplification by subsampling, arXiv 1908.10530).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from strategies.api import RoundState, Selected, Selection


class PoissonSelection(Selection):
    ignores_data = True

    def __init__(self, *, rate: Annotated[float, Field(gt=0, le=1)] = 0.1) -> None:
        """`rate`: probability with which a device takes part in a round."""
        self.sampling_rate = float(rate)

    def select(self, state: RoundState) -> Selected:
        came = {candidate.name: state.random.random() < self.sampling_rate for candidate in state.by_name()}
        chance = f"of {self.sampling_rate:g} for each device and round"
        why = {name: f"{'drawn' if is_in else 'not drawn'} with a probability {chance}" for name, is_in in came.items()}
        return Selected([name for name, is_in in came.items() if is_in], why)
