"""Counts how much a run's noisy releases give away: epsilon for a noise, and the noise for an epsilon.

A release is a sum of which each source moves at most one clipping bound, plus Gaussian noise; two data sets are neighbours if
one source adds nothing in one of them ("zero-out", as in arXiv 2103.00039). Composition, Poisson sampling and the conversion to (epsilon,
delta) are those of Google's library dp-accounting. Knows numbers; knows neither tensors, nor who the sources are, nor whether
the noise was drawn as assumed here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from edgelam_fl.errors import ConfigError

_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e6
_ROUNDING = 1e-4  # relative: how close a found noise is to the smallest
_GRID, _FEW_ROUNDS = 1e-3, 1000  # step of the grid of privacy losses, for so many rounds


@dataclass(frozen=True)
class Releases:
    """The noisy releases of a run."""

    noise: float
    """Standard deviation of a release's noise, as a multiple of what one source can move in it."""
    rounds: int
    per_round: int = 1
    """Releases in a round, all of the same noise and of the same sources."""
    sampling: float = 1.0
    """The probability with which each source takes part in a round, each by a coin of its own (Poisson sampling); 1: no
    amplification is claimed."""


@lru_cache(maxsize=1024)
def epsilon_of(releases: Releases, delta: float, accountant: str = "pld") -> float:
    """Returns the epsilon of (epsilon, delta)-differential privacy that the releases have together; 0 for none.

    `accountant`: "pld" composes privacy loss distributions (arXiv 2207.04380), "rdp" Renyi divergences (arXiv 1702.07476,
    1908.10530), which gives more. Both err on the safe side. Raises ConfigError without the library.
    """
    if not releases.rounds:
        return 0.0
    if not releases.noise:
        return math.inf
    accounting = _library()
    # Releases of one round about the same sources are one release of less noise: their precisions add up.
    noise, rounds = releases.noise / math.sqrt(releases.per_round), releases.rounds
    if releases.sampling == 1:
        noise, rounds = noise / math.sqrt(rounds), 1
    if noise < _LEAST_NOISE:
        return math.inf  # an epsilon in the thousands: nothing is promised, and the grid would be huge
    event = accounting.GaussianDpEvent(noise)
    if releases.sampling < 1:
        event = accounting.PoissonSampledDpEvent(releases.sampling, event)
    with _quiet():
        known = _accountant(accounting, accountant, noise, rounds)
        return float(known.compose(event, rounds).get_epsilon(delta))


def noise_for(
    epsilon: float, delta: float, rounds: int, per_round: int = 1, sampling: float = 1.0, accountant: str = "pld"
) -> float:
    """Returns the smallest noise multiplier with which the releases stay within (epsilon, delta), rounded up by at most 0.02 %.

    Raises ConfigError if a million is not enough.
    """

    def excess(log_noise: float) -> float:
        return epsilon_of(replace(releases, noise=math.exp(log_noise)), delta, accountant) - epsilon

    releases = Releases(1.0, rounds, per_round, sampling)
    low, high = _bracket(excess)
    return math.exp(_crossing(excess, low, high))


def rounds_within(epsilon: float, delta: float, releases: Releases, accountant: str = "pld") -> int:
    """Returns how many of the `releases.rounds` rounds stay within (epsilon, delta)."""
    fits, fails = 0, releases.rounds + 1
    guess = releases.rounds  # most runs are planned to fit
    while fails - fits > 1:
        inside = epsilon_of(replace(releases, rounds=guess), delta, accountant) <= epsilon
        fits, fails = (guess, fails) if inside else (fits, guess)
        guess = (fits + fails) // 2
    return fits


def _bracket(excess: Any) -> tuple[float, float]:
    """Returns the logarithms of a noise that is too small and of one that is enough, a factor of two apart."""
    step, here = math.log(2.0), 0.0
    if excess(here) > 0:
        while excess(here + step) > 0:
            here += step
            if here > math.log(_MOST_NOISE):
                raise ConfigError(
                    f"no noise multiplier up to {_MOST_NOISE:g} keeps the epsilon that privacy.epsilon asks for"
                )
        return here, here + step
    while excess(here - step) <= 0:
        here -= step
    return here - step, here


def _crossing(excess: Any, low: float, high: float) -> float:
    """Returns the logarithm of a noise just above the smallest that is enough, by false position (Illinois)."""
    at_low, at_high = excess(low), excess(high)
    while high - low > _ROUNDING:
        if math.isfinite(at_low) and at_low > at_high:
            guess = high - at_high * (high - low) / (at_high - at_low)
            guess = min(max(guess, low + _ROUNDING / 2), high - _ROUNDING / 2)
        else:
            guess = (low + high) / 2
        found = excess(guess)
        if found > 0:
            low, at_low, at_high = guess, found, at_high / 2
        else:
            high, at_high, at_low = guess, found, at_low / 2
    return high


def _accountant(accounting: Any, name: str, noise: float, rounds: int) -> Any:
    """Makes the library's accountant. Its grid of privacy losses errs upwards by about the square of its step per round, so the
    step may be coarser with less noise, when epsilon is large, and must be finer for many rounds.
    """
    if name == "rdp":
        return accounting.rdp.RdpAccountant()
    grid = _GRID * max(1.0, 1 / noise) * min(1.0, math.sqrt(_FEW_ROUNDS / rounds))
    return accounting.pld.PLDAccountant(value_discretization_interval=grid)


def _library() -> Any:
    """Returns the module dp_accounting, which takes a second to import and which runs without privacy do not need."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise ConfigError(
            "privacy.mode needs the library dp-accounting on the server: pip install 'edgelam-fl[privacy]'"
        ) from error
    return dp_accounting


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library's log, which has a line for each Renyi order that it leaves out."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
