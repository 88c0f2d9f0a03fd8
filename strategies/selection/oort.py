"""Oort (arXiv 2010.06081): chooses devices with a high loss that are fast enough, and some new devices.

Utility U = n sqrt(mean loss^2). The score is U, clipped and scaled to 0..1, plus sqrt(0.1 ln R / last round); all of it, the
bonus too, is multiplied by (T / t)^alpha for a device that takes t > T seconds (as in FedScale's code). A share epsilon of the places goes to devices never tried; the others are drawn by score
among the devices near the best. T is a percentile of the devices' times, which the pacer raises when the utility gained has become
flat, and lowers when it jumps (as in FedScale's code). The squares here are of a device's mean loss per step, and new devices are
drawn in proportion to their examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from strategies.api import Candidate, RoundOutcome, RoundState, Selected, Selection
from strategies.selection.ranking import drawn

Share = Annotated[float, Field(ge=0, le=1)]


class Oort(Selection):
    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(ge=0)] = 2.0,
        epsilon: Share = 0.9,
        epsilon_decay: Share = 0.98,
        epsilon_least: Share = 0.2,
        clip: Share = 0.95,
        cut_off: Share = 0.95,
        percentile: Annotated[float, Field(gt=0, le=100)] = 30.0,
        pacer_rounds: Annotated[int, Field(ge=1)] = 20,
        pacer_step: Annotated[float, Field(gt=0, le=100)] = 5.0,
        most_rounds: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        """`alpha`: how much slow devices lose. `clip`: quantile at which utilities are cut. `cut_off`: share of the last chosen
        score from which on a device may be drawn too. `percentile`: percentile of the times that T starts with.
        `most_rounds`: devices that took part more often are left out if the others are enough; 0: never.
        """
        self.alpha, self.clip, self.cut_off, self.most_rounds = alpha, clip, cut_off, most_rounds
        self.epsilon, self.epsilon_decay, self.epsilon_least = epsilon, epsilon_decay, epsilon_least
        self.percentile, self.pacer_rounds, self.pacer_step = percentile, pacer_rounds, pacer_step
        self._gained: list[float] = []  # mean utility of the devices of each round, of the newest rounds
        self._observed = 0  # rounds
        self._rounds: Counter[str] = Counter()

    def select(self, state: RoundState) -> Selected:
        candidates, wanted = state.by_name(), state.at_most()
        why = {c.name: f"took part {self._rounds[c.name]} times, more than {self.most_rounds}" for c in candidates}
        allowed = self._allowed(candidates, wanted)
        fresh = [c for c in allowed if c.last_round == 0]
        scores = self._scores([c for c in allowed if c.last_round], state.round)
        known = sorted((c for c in allowed if c.last_round), key=lambda c: (-scores[c.name], c.name))
        explored = min(max(round(wanted * self.epsilon), wanted - len(known)), len(fresh))
        exploited = min(wanted - explored, len(known))
        near = self._near(known, scores, exploited)
        best = drawn(near, [scores[c.name] for c in near], exploited, state.random)
        new = drawn(fresh, [float(c.examples) for c in fresh], explored, state.random)
        for c in allowed:
            why[c.name] = f"score {scores[c.name]:.3g}" if c.name in scores else "never tried"
        for c in (*best, *new):
            why[c.name] += f": {'drawn by score' if c.name in scores else 'drawn to explore'}"
        for c in allowed:
            why[c.name] += "" if ": " in why[c.name] else f": not drawn, {exploited} by score and {explored} new"
        return Selected(sorted(c.name for c in (*best, *new)), why)

    def state(self) -> Mapping[str, Any]:
        return {
            "epsilon": self.epsilon,
            "percentile": self.percentile,
            "gained": list(self._gained),
            "observed": self._observed,
            "rounds": dict(self._rounds),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.epsilon, self.percentile, self._observed = state["epsilon"], state["percentile"], state["observed"]
        self._gained, self._rounds = list(state["gained"]), Counter(state["rounds"])

    def observe(self, outcome: RoundOutcome) -> None:
        self._rounds.update(device.name for device in outcome.devices)
        self.epsilon = max(self.epsilon * self.epsilon_decay, self.epsilon_least)
        gains = [_utility(device) for device in outcome.devices]
        self._gained.append(math.fsum(gains) / len(gains) if gains else 0.0)
        del self._gained[: -2 * self.pacer_rounds]
        self._observed += 1
        self._pace()

    def _pace(self) -> None:
        rounds = self.pacer_rounds
        if self._observed < 2 * rounds or self._observed % rounds:
            return
        before, now = math.fsum(self._gained[:rounds]), math.fsum(self._gained[rounds:])
        if abs(now - before) <= 0.1 * before:
            self.percentile = min(self.percentile + self.pacer_step, 100.0)
        elif abs(now - before) >= 5 * before:
            self.percentile = max(self.percentile - self.pacer_step, self.pacer_step)

    def _allowed(self, candidates: Sequence[Candidate], wanted: int) -> list[Candidate]:
        allowed = [c for c in candidates if not self.most_rounds or self._rounds[c.name] <= self.most_rounds]
        return allowed if len(allowed) >= wanted else list(candidates)

    def _scores(self, known: Sequence[Candidate], round_: int) -> dict[str, float]:
        if not known:
            return {}
        utilities = sorted(_utility(c) for c in known)
        low, high = utilities[0], utilities[min(int(len(utilities) * self.clip), len(utilities) - 1)]
        times = sorted(c.last_seconds or 0.0 for c in known)
        preferred_s = times[min(int(len(times) * self.percentile / 100), len(times) - 1)]
        if self.percentile >= 100:
            preferred_s = math.inf
        scores = {}
        for c in known:
            score = (min(_utility(c), high) - low) / (high - low) if high > low else 1.0
            score += math.sqrt(0.1 * math.log(max(round_, 1)) / c.last_round)
            if (c.last_seconds or 0.0) > preferred_s:
                score *= (preferred_s / c.last_seconds) ** self.alpha  # type: ignore[operator]
            scores[c.name] = score
        return scores

    def _near(self, known: Sequence[Candidate], scores: dict[str, float], count: int) -> list[Candidate]:
        """Returns the best `count` of the sorted `known`, and those with nearly the score of the last of them."""
        if not count:
            return []
        least = self.cut_off * scores[known[count - 1].name]
        return [c for c in known if scores[c.name] >= least]


def _utility(candidate: Candidate) -> float:
    squared = candidate.squared_loss
    if squared is None:
        squared = (candidate.last_loss or 0.0) ** 2
    return candidate.examples * math.sqrt(squared)
