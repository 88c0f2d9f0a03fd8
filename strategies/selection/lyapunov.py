"""The online Lyapunov scheduler (arXiv 2407.02924): chooses as many devices as a bound on the average delay of rounds allows.

A virtual queue holds how much longer than the bound the rounds so far were: Q <- max(Q + tau / bound - 1, 0). Each round
minimises V / n + Q tau_n / bound over the number n of devices, tau_n being the least delay of n devices that finish together:
drift plus penalty. V is a trade-off: the average delay stays within O(V / rounds) above the bound, the participation within
O(1 / V) of the best. (In the paper rounds may differ in weight; here all weigh the same.)

At a given delay the share that a device needs does not depend on other devices, so the n devices that need the smallest shares
are the best n. Up to 64 devices all subsets are covered; beyond, the result is within 0.1 % of the best.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from strategies.api import RoundOutcome, RoundState, Selected, Selection
from strategies.bandwidth.links import Needs, fitting, least_delays, needs_of

EXACT_UP_TO = 64
_TOLERANCE = 5e-4


class LyapunovSelection(Selection):
    def __init__(
        self, *, delay_s: Annotated[float, Field(gt=0)] = 30.0, v: Annotated[float, Field(ge=0)] = 10.0
    ) -> None:
        """`delay_s`: average time that a round may take on the devices. `v`: weight of choosing many devices."""
        self.delay_s, self.v = delay_s, v
        self.queue = 0.0  # in rounds of delay_s

    def select(self, state: RoundState) -> Selected:
        candidates = state.by_name()
        if not candidates:
            return Selected([])
        needs = needs_of(candidates, state.capacity_bps)
        most = state.at_most()
        count, delay_s = best_count(needs, self.v, self.queue / self.delay_s, min(state.least, most), most)
        shares = needs.shares(delay_s)
        chosen = {int(index) for index in np.argsort(shares, kind="stable")[:count]}
        names = [candidates[index].name for index in sorted(chosen)]
        round_ = f"{count} of {len(candidates)} devices in {delay_s:.3g} s, queue {self.queue:.3g}"
        return Selected(names, {c.name: _reason(i in chosen, shares[i], round_) for i, c in enumerate(candidates)})

    def state(self) -> Mapping[str, Any]:
        return {"queue": self.queue}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.queue = state["queue"]

    def observe(self, outcome: RoundOutcome) -> None:
        self.queue = max(self.queue + outcome.seconds / self.delay_s - 1, 0.0)


def _reason(chosen: bool, share: float, round_: str) -> str:
    needed = f"needs a share of {share:.3g}" if np.isfinite(share) else "does not finish in time with any share"
    return f"{needed}, {'among' if chosen else 'not among'} the smallest: {round_}"


def best_count(needs: Needs, v: float, pressure: float, least: int, most: int) -> tuple[int, float]:
    """Returns the (n, tau_n) that minimises v / n + pressure tau_n over least <= n <= most."""
    if len(needs) > EXACT_UP_TO:
        count = _search(needs, v, pressure, least, most)
        return count, float(least_delays(needs, [count])[0])
    counts = range(most, least - 1, -1)  # from many to few, so that more devices win a tie
    delays = least_delays(needs, counts)
    best = int(np.argmin([v / n + pressure * delay for n, delay in zip(counts, delays, strict=True)]))
    return counts[best], float(delays[best])


def _search(needs: Needs, v: float, pressure: float, least: int, most: int) -> int:
    """Searches by branch and bound over the delay: between two delays no n does better than the larger n at the smaller delay."""
    low, high = (float(delay) for delay in least_delays(needs, [least, most]))
    best, negative = min((v / most + pressure * high, -most), (v / least + pressure * low, -least))
    waiting = [(v / most + pressure * low, low, least, high, most)]
    while waiting:
        bound, low, few, high, many = heapq.heappop(waiting)
        if bound >= best * (1 - _TOLERANCE):
            break
        middle = (low + high) / 2
        fit = min(int(fitting(needs.shares(middle))), most)
        best, negative = min((best, negative), (v / fit + pressure * middle, -fit))
        if few < fit:
            heapq.heappush(waiting, (v / fit + pressure * low, low, few, middle, fit))
        if fit < many:
            heapq.heappush(waiting, (v / many + pressure * middle, middle, fit, high, many))
    return -negative
