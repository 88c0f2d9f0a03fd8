"""Sums up the cells of the defences' table over seeds: figures, table and plot. Knows neither training nor attacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.common import Figure
from benchmarks.leakage.defence_cells import INVERTER, NONE, REPLAY, RIDGE, SEEDS, Row, Sizes
from benchmarks.leakage.drawing import Panel, draw

BAR_POINTS, BAR_PERCENT = 30.0, 10.0
ATTACKS = (RIDGE, INVERTER, REPLAY)


@dataclass(frozen=True)
class Case:
    """One setting at one cut against one attacker: what was measured per seed, and over seeds.

    `first`: no defence at the first cut, per seed; points and price are against it, seed by seed.
    """

    name: str
    rows: tuple[Row, ...]
    first: Mapping[int, Row]

    def share(self, attack: str) -> float:
        return mean(row.shares[attack] for row in self.rows)

    @property
    def best(self) -> float:
        return mean(row.best for row in self.rows)

    @property
    def perplexity(self) -> float:
        return mean(row.perplexity for row in self.rows)

    @property
    def cpu_s(self) -> float:
        return mean(row.cpu_s_per_step for row in self.rows)

    @property
    def bytes_per_step(self) -> float:
        return mean(row.bytes_per_step for row in self.rows)

    @property
    def points_of_seeds(self) -> list[float]:
        """The points that the best attack loses, per seed."""
        return [100 * (self.first[row.seed].best - row.best) for row in self.rows]

    @property
    def price_of_seeds(self) -> list[float]:
        """What perplexity rises by, in %, per seed."""
        return [100 * (row.perplexity / self.first[row.seed].perplexity - 1) for row in self.rows]


def cases(rows: Sequence[Row]) -> list[Case]:
    """Joins the seeds. A private front gives two cases: without its adapter, and with it.

    Seeds without a measurement of no defence are left out: there is nothing to compare them with.
    """
    first = {row.seed: row for row in rows if (row.name, row.cut) == (NONE.name, NONE.cuts[0])}
    first = first or {row.seed: row for row in rows[:1]}  # a smoke run has one setting
    private = {row.name for row in rows if not row.known}
    found: dict[str, list[Row]] = {}
    for row in rows:
        extra = ", adapter known" if row.known and row.name in private else ""
        if row.seed in first:
            found.setdefault(f"{row.name}, cut {row.cut}{extra}", []).append(row)
    return [Case(name, tuple(group), first) for name, group in found.items()]


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    figures, found = [], cases(rows)
    for case in found:
        figures += _figures(case)
    affordable = [case for case in found if mean(case.price_of_seeds) <= BAR_PERCENT]
    most = max((mean(case.points_of_seeds) for case in affordable), default=0.0)
    figures.append(Figure(f"most points off for at most {BAR_PERCENT:.0f} % perplexity", round(most, 1), "points"))
    bar = f"at least {BAR_POINTS:.0f} points for at most {BAR_PERCENT:.0f} % perplexity"
    figures.append(
        Figure("points off the best attack at that price", round(most, 1), "points", bar, most >= BAR_POINTS)
    )
    complete = sum(len(case.rows) == len(SEEDS) for case in found if "adapter known" not in case.name)
    figures.append(Figure(f"rows with all {len(SEEDS)} seeds", complete, ""))
    return figures


def _figures(case: Case) -> list[Figure]:
    figures = [
        Figure(f"{case.name}: seeds", len(case.rows), ""),
        Figure(f"{case.name}: perplexity", round(case.perplexity, 2), ""),
        *(Figure(f"{case.name}: {attack}", percent(case.share(attack)), "% of tokens") for attack in ATTACKS),
        Figure(f"{case.name}: best attack", percent(case.best), "% of tokens"),
        Figure(f"{case.name}: points off the best attack", round(mean(case.points_of_seeds), 1), "points"),
        Figure(f"{case.name}: price in perplexity", round(mean(case.price_of_seeds), 1), "%"),
        Figure(f"{case.name}: time of a step", round(case.cpu_s, 3), "CPU s"),
        Figure(f"{case.name}: sent per step", round(case.bytes_per_step), "bytes"),
        Figure(f"{case.name}: frozen weights on the device", case.rows[0].weights_bytes, "bytes"),
    ]
    if len(case.rows) > 1:
        figures += [
            Figure(f"{case.name}: best attack, spread", round(100 * stdev(row.best for row in case.rows), 1), "points"),
            Figure(f"{case.name}: points off, spread", round(stdev(case.points_of_seeds), 1), "points"),
            Figure(f"{case.name}: price, spread", round(stdev(case.price_of_seeds), 1), "points"),
        ]
    return figures


def percent(value: float) -> float:
    return round(100 * value, 1)


def table(rows: Sequence[Row], sizes: Sizes, private_tokens: int, chance: float) -> str:
    lines = [
        "# Defences at the cut",
        "",
        f"% of {private_tokens:,} private tokens that attacks read, adapted to the defence (token by token: of the first",
        f"{sizes.replayed} texts), and the perplexity of held-out texts after {sizes.steps} steps: means over n seeds, with the standard",
        f"deviation. Points and price are against no defence at cut {NONE.cuts[0]}, seed by seed. Always guessing the commonest token",
        f"reads {percent(chance)} %. Written by `python -m benchmarks.leakage --part defences`, whose module says what attacker and",
        "training are.",
        "",
        f"| setting | n | {' | '.join(ATTACKS)} | best | points off | perplexity | price | CPU s per step | sent per step | weights on the device |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases(rows):
        shares = " | ".join(f"{percent(case.share(attack)):.1f}" for attack in ATTACKS)
        best = _spread((100 * row.best for row in case.rows), "{:.1f}")
        price = _spread(case.price_of_seeds, "{:+.1f}")
        lines.append(
            f"| {case.name} | {len(case.rows)} | {shares} | {best} | {_spread(case.points_of_seeds, '{:.1f}')} | {case.perplexity:.2f} | "
            f"{price} % | {case.cpu_s:.2f} | {case.bytes_per_step / 1e3:.0f} kB | {case.rows[0].weights_bytes / 1e6:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: Iterable[float], form: str) -> str:
    """Writes a mean with its standard deviation, if there are several values."""
    listed = list(values)
    return form.format(mean(listed)) + (f" ± {stdev(listed):.1f}" if len(listed) > 1 else "")


def picture(rows: Sequence[Row]) -> str:
    """Draws recovered tokens against what the defence costs."""
    lines = {
        case.name: [(round(max(0.0, mean(case.price_of_seeds)), 1), percent(case.best))]
        for case in cases(rows)
    }  # fmt: skip
    return draw([Panel("best attack, % of tokens", "perplexity, % above no defence", lines)])
