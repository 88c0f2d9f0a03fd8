"""Compares the cells of a matrix and writes tables in Markdown, from the lines of its cells. Knows no processes.

Accuracies are compared seed by seed: both runs of a pair had the same data, dealt alike, and started from the same adapter.
A difference counts as one if a paired t test says so after Holm's correction for all comparisons of its table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from edgelam_fl.bench.matrix import NO_PRIVACY, Cell, Matrix
from edgelam_fl.names import printable, without_colours
from edgelam_fl.telemetry.measures import MEASURES, with_unit

Lines = Mapping[str, Mapping[str, Any]]  # the newest line of each cell and reference, by name
Group = tuple[Any, ...]  # a value per varied axis, without the seed: one row of a table
COSTS = {"bytes": "MB", "virtual_seconds": "virtual s", "joules": "J"}
_SCALE = {"bytes": 1e6, "virtual_seconds": 1.0, "joules": 1.0}
_MEASURES = ("accuracy", *(name for name in MEASURES if name != "accuracy"))  # a classification has a perplexity too
_LEVEL = 0.05  # of the tests, and of what intervals miss


def groups(matrix: Matrix, lines: Lines) -> dict[Group, list[Mapping[str, Any]]]:
    """Groups the lines of finished cells by all axes but the seed, in the order of the table."""
    found: dict[Group, list[Mapping[str, Any]]] = {}
    axes = matrix.varied() or ["aggregation"]
    for cell in sorted(matrix.cells(), key=lambda cell: _order(matrix, cell)):
        line = lines.get(cell.name)
        if line and line["state"] == "done":
            found.setdefault(tuple(cell.values[axis] for axis in axes), []).append(line)
    return found


def _order(matrix: Matrix, cell: Cell) -> list[int]:
    """Sorts by partition and attack first, so that a table has the compared rows beside each other."""
    last = [axis for axis in ("partition", "attack") if axis in matrix.varied()]
    axes = last + [axis for axis in matrix.varied() if axis not in last]
    return [getattr(matrix.axes, axis).index(cell.values[axis]) for axis in axes]


def measure_of(line: Mapping[str, Any]) -> str:
    """Returns the name of the measure that a finished line has, or a point of its curve."""
    return next(name for name in _MEASURES if line.get(name) is not None)


def value_of(line: Mapping[str, Any]) -> float:
    """Returns a line's measure as people read it, an accuracy as a share."""
    return float(line[measure_of(line)])


def quality(line: Mapping[str, Any]) -> float:
    """Returns a number of which higher is better: the measure, or its negative."""
    return value_of(line) if MEASURES[measure_of(line)].higher else -value_of(line)


def measure_in(lines: Lines) -> str:
    """Returns the measure that all finished lines have."""
    done = [line for line in lines.values() if line["state"] == "done"]
    return measure_of(done[0]) if done else "accuracy"


def title_of(lines: Lines) -> str:
    """Returns the measure with its unit, as the head of a column."""
    measure = measure_in(lines)
    return f"{measure}, %" if MEASURES[measure].percent else with_unit(measure)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation; the deviation of one value is 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def differences(matrix: Matrix, lines: Lines, axis: str = "", baseline: str = "") -> dict[Group, list[float]]:
    """Returns each group's quality minus the baseline's, seed by seed, all else equal. Groups without a pair are absent.

    `axis`, `baseline`: the axis to compare along and its value to compare with; "": those of the matrix.
    """
    axis, baseline = axis or matrix.compared, baseline or matrix.bench.baseline
    axes = matrix.varied() or ["aggregation"]
    done = [(cell, lines[cell.name]) for cell in matrix.cells() if lines.get(cell.name, {}).get("state") == "done"]
    bases = {cell.same_but(axis): quality(line) for cell, line in done if cell.values[axis] == baseline}
    found: dict[Group, list[float]] = {}
    for cell, line in done:
        base = bases.get(cell.same_but(axis))
        if base is not None and cell.values[axis] != baseline:
            found.setdefault(tuple(cell.values[name] for name in axes), []).append(quality(line) - base)
    return found


@dataclass(frozen=True)
class Compared:
    """The mean of paired differences with its 95 % interval, and p of "no difference", corrected; nan: of one pair."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def differs(self) -> bool:
        return self.p < _LEVEL


def compared(pairs: Mapping[Group, Sequence[float]]) -> dict[Group, Compared]:
    """Tests each group's differences against zero: paired t tests, corrected for their number by Holm's method.

    Holm (Scand. J. Statist. 6, 1979): the k-th smallest of n p-values is multiplied by n - k + 1, and kept in order.
    """
    found = {group: tested(values) for group, values in pairs.items()}
    ordered = sorted((group for group in found if not math.isnan(found[group].p)), key=lambda group: found[group].p)
    corrected, least = {}, 0.0
    for rank, group in enumerate(ordered):
        least = max(least, min(1.0, found[group].p * (len(ordered) - rank)))
        corrected[group] = least
    return {group: Compared(c.mean, c.low, c.high, corrected.get(group, c.p)) for group, c in found.items()}


def tested(values: Sequence[float]) -> Compared:
    """Returns the t interval and p of one group, not corrected."""
    from scipy.stats import t  # takes a second; comes with scikit-learn, which `edgelam bench` needs

    mean, spread = mean_and_spread(list(values))
    if len(values) < 2:
        return Compared(mean, math.nan, math.nan, math.nan)
    error, freedom = spread / math.sqrt(len(values)), len(values) - 1
    if not error:  # of equal differences, which accuracies on a finite test set can be
        return Compared(mean, mean, mean, 0.0 if mean else 1.0)
    reach = float(t.ppf(1 - _LEVEL / 2, freedom)) * error
    return Compared(mean, mean - reach, mean + reach, 2 * float(t.sf(abs(mean) / error, freedom)))


# ---------------------------------------------------------------- tables


def markdown(matrix: Matrix, lines: Lines) -> str:
    """Returns the results as Markdown: tables, which differences are real, references, protocols, failures."""
    parts = [f"# {matrix.name}\n", about(matrix, lines), _table(matrix, lines), sentences(matrix, lines)]
    parts += [beyond(matrix, lines), _failures(lines)]
    return "\n".join(part for part in parts if part)


def beyond(matrix: Matrix, lines: Lines) -> str:
    """Returns the tables after the first as Markdown: the costs of privacy, references, protocols."""
    parts = [_privacy_costs(matrix, lines), _references(lines), _protocols(matrix, lines)]
    return "\n".join(part for part in parts if part)


def about(matrix: Matrix, lines: Lines) -> str:
    bench, done = matrix.bench, sum(line["state"] == "done" for line in lines.values())
    text = (
        f"{done} of {len(matrix.cells())} cells. {bench.dataset}, {bench.examples or 'all'} examples, {bench.test:.0%} of them "
        f"measured, the rest dealt to {bench.devices} devices; seeds {', '.join(map(str, matrix.axes.seed))}. n counts the seeds, "
        f"and the spread is their sample standard deviation; differences are taken seed by seed, with the 95 % interval of a "
        f"paired t test, and with p corrected for all comparisons of a table (Holm). The intervals are not corrected.\n"
    )
    tune = matrix.tune
    if tune.keys:
        choices = "; ".join(f"{key} of {', '.join(map(str, values))}" for key, values in tune.keys.items())
        text += (
            f"\nThe settings behind a strategy's name were chosen for it on seed {tune.seed}, measured with {tune.share:.0%} of the "
            f"training examples and not with the test set: {choices} (tuning/results.md).\n"
        )
        if any(cell.private for cell in matrix.cells()):
            text += "\nNo epsilon counts these tries: they looked at the training examples without privacy.\n"
    text += _not_whole(lines)
    if any(line.get("personal") for line in lines.values()):
        text += (
            "\nWhere devices keep an adapter of their own, each measures its own on its equal part of the common test set, and "
            "the mean is shown: how well a device's own adapter does on everybody's texts.\n"
        )
    return text


def _not_whole(lines: Lines) -> str:
    """Says how many examples were cut or left out, of the cell with the most; empty if all were whole."""
    found = [line["data"] for line in lines.values() if line.get("data")]
    most = max(found, key=lambda data: data["cut"] + data["left_out"], default=None)
    if most is None or not most["cut"] + most["left_out"]:
        return ""
    return (
        f"\nOf {most['examples'] + most['left_out']} examples {most['cut']} were cut and {most['left_out']} left out at "
        f"task.max_tokens, in the cell with the most of them.\n"
    )


def _table(matrix: Matrix, lines: Lines) -> str:
    axes = matrix.varied() or ["aggregation"]
    apart = compared(differences(matrix, lines))
    percent, name = is_accuracy(lines), title_of(lines)
    costs = [cost for cost in COSTS if any(line.get(cost) for line in lines.values())]
    heads = [*axes, "n", name, "spread", *_difference_heads(matrix.bench.baseline), "aggregation error"]
    rows = [heads + [COSTS[cost] for cost in costs], ["---"] * (len(heads) + len(costs))]
    for group, found in groups(matrix, lines).items():
        scale = 100 if percent else 1
        row = [*map(word, group), str(len(found)), *_shown([scale * value_of(line) for line in found])]
        row += _difference(apart.get(group), scale)
        errors = [line["aggregation_error"] for line in found if line["aggregation_error"] is not None]
        row.append(f"{fmean(errors):.3g}" if errors else "")
        row += [f"{fmean(line[cost] for line in found) / _SCALE[cost]:.1f}" for cost in costs]
        rows.append(row)
    return _rows(rows)


def word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(values: list[float]) -> list[str]:
    """Formats mean and spread as two table cells; one value has no spread."""
    mean, spread = mean_and_spread(values)
    return [f"{mean:.2f}", f"{spread:.2f}" if len(values) > 1 else ""]


def _difference_heads(baseline: str) -> list[str]:
    return [f"less {baseline}", "95 % interval", "p"]


def _difference(found: Compared | None, scale: float) -> list[str]:
    """Formats a comparison as three table cells; one pair has no interval."""
    if found is None:
        return ["", "", ""]
    mean = f"{scale * found.mean:+.2f}"
    if math.isnan(found.p):
        return [mean, "", ""]
    return [mean, f"{scale * found.low:+.2f} to {scale * found.high:+.2f}", f"{found.p:.2g}"]


def _rows(rows: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def sentences(matrix: Matrix, lines: Lines, axis: str = "", baseline: str = "") -> str:
    """Names the differences that are real by the corrected test."""
    real, not_shown = [], []
    found = compared(differences(matrix, lines, axis, baseline))
    for group, one in found.items():
        name = name_of(group)
        if one.differs:
            real.append(f"{name} ({100 * one.mean:+.2f} points)" if is_accuracy(lines) else f"{name} ({one.mean:+.2f})")
        else:
            not_shown.append(name)
    if not found:
        return ""
    if len(matrix.axes.seed) < 2:
        return "\nOne seed: the spread over seeds is not known, so no difference is called one.\n"
    base = "no privacy" if axis == "epsilon" else matrix.bench.baseline
    return (
        f"\nReal differences to {base}, by the corrected test at {100 * _LEVEL:g} %: {', '.join(real) or 'none'}.\n"
        f"Not shown by these seeds, which is not the same as equal: {', '.join(not_shown) or 'none'}.\n"
    )


def _privacy_costs(matrix: Matrix, lines: Lines) -> str:
    """Compares each epsilon with no privacy, all else equal."""
    found = compared(differences(matrix, lines, "epsilon", NO_PRIVACY))
    if not found:
        return ""
    heads = [*matrix.varied(), *_difference_heads("no privacy")]
    scale = 100 if is_accuracy(lines) else 1
    rows = [[*map(word, group), *_difference(one, scale)] for group, one in found.items()]
    return "\n" + _rows([heads, ["---"] * len(heads), *rows]) + sentences(matrix, lines, "epsilon", NO_PRIVACY)


def is_accuracy(lines: Lines) -> bool:
    """Returns whether the finished lines are measured by their accuracy, which is shown in per cent."""
    return measure_in(lines) == "accuracy"


def references(lines: Lines) -> dict[str, list[float]]:
    """Returns the accuracies of each reference by what it is, one per seed."""
    found: dict[str, list[float]] = {}
    for line in lines.values():
        if line["state"] == "reference":
            found.setdefault(str(line["what"]), []).append(float(line["accuracy"]))
    return found


def _references(lines: Lines) -> str:
    found = references(lines)
    if not found:
        return ""
    rows = [["reference line", "n", "accuracy, %", "spread"], ["---"] * 4]
    return "\n" + _rows(
        rows + [[what, str(len(values)), *_shown([100 * value for value in values])] for what, values in found.items()]
    )


def _failures(lines: Lines) -> str:
    failed = [f"- {name}: {cause(line)}\n" for name, line in lines.items() if line["state"] == "failed"]
    return "\nFailed cells:\n\n" + "".join(failed) if failed else ""


def cause(line: Mapping[str, Any]) -> str:
    """Returns why a cell failed, as plain text in one line, with the place of its logs."""
    logs = f"; logs: {line['logs']}" if line.get("logs") else ""
    return f"{printable(without_colours(str(line['reason'])), 1000)}{logs}"


def figures(matrix: Matrix, lines: Lines) -> list[dict[str, Any]]:
    """Returns the numbers of the tables by name, for pages that quote them: accuracies in per cent, differences in points.

    Per row its mean and spread; per comparison the difference, the ends of its interval, and p. What is not known is left out.
    """
    scale, unit = (100, "%") if is_accuracy(lines) else (1, "")
    found: dict[str, float] = {}
    for group, cells in groups(matrix, lines).items():
        mean, spread = mean_and_spread([value_of(line) for line in cells])
        found |= {f"{name_of(group)}: quality": scale * mean, f"{name_of(group)}: spread": scale * spread}
        found[f"{name_of(group)}: seeds"] = len(cells)
    for what, values in references(lines).items():
        mean, spread = mean_and_spread(values)
        found |= {f"{what}: quality": scale * mean, f"{what}: spread": scale * spread, f"{what}: seeds": len(values)}
    bases = {matrix.bench.baseline: differences(matrix, lines), "no privacy": {}}
    if "epsilon" in matrix.varied():
        bases["no privacy"] = differences(matrix, lines, "epsilon", NO_PRIVACY)
    for base, pairs in bases.items():
        for group, one in compared(pairs).items():
            name = f"{name_of(group)}, less {base}"
            found[f"{name}: mean"] = scale * one.mean
            if not math.isnan(one.p):
                found |= {f"{name}: low": scale * one.low, f"{name}: high": scale * one.high, f"{name}: p": one.p}
    return [
        {"name": name, "value": round(value, 6), "unit": "" if name.endswith((": p", ": seeds")) else unit, "bar": None,
         "holds": None}
        for name, value in found.items()
    ]  # fmt: skip


def name_of(group: Group) -> str:
    return " ".join(map(word, group))


# ---------------------------------------------------------------- protocols


def at_budget(line: Mapping[str, Any], cost: str, budget: float) -> float | None:
    """Returns the last quality that was measured before the budget was spent; None: none was."""
    within = [point for point in line["curve"] if point[cost] <= budget]
    return quality(within[-1]) if within else None


def cost_to(line: Mapping[str, Any], cost: str, target: float) -> float | None:
    """Returns the cost when the quality first reached the target; None: it never did."""
    for point in line["curve"]:
        if quality(point) >= target:
            return float(point[cost])
    return None


def _protocols(matrix: Matrix, lines: Lines) -> str:
    protocols, text = matrix.protocols, ""
    budgets = {
        "bytes": protocols.budget_bytes, "virtual_seconds": protocols.budget_seconds, "joules": protocols.budget_joules,
    }  # fmt: skip
    for cost, budget in budgets.items():
        if budget:
            title = f"quality for {budget / _SCALE[cost]:g} {COSTS[cost]}"
            text += _measured(matrix, lines, title, lambda line, c=cost, b=budget: at_budget(line, c, b), 1.0)
    for cost in COSTS if protocols.target else ():
        if any(line.get(cost) for line in lines.values()):
            title = f"{COSTS[cost]} to {protocols.target:g}"
            text += _measured(
                matrix, lines, title, lambda line, c=cost: cost_to(line, c, protocols.target), _SCALE[cost]
            )
    return text


def _measured(matrix: Matrix, lines: Lines, title: str, of: Any, scale: float) -> str:
    rows = [[*(matrix.varied() or ["aggregation"]), title, "seeds that came so far"], []]
    rows[1] = ["---"] * len(rows[0])
    for group, found in groups(matrix, lines).items():
        values = [value for line in found if (value := of(line)) is not None]
        mean = f"{fmean(values) / scale:.4g}" if values else "never"
        rows.append([*map(word, group), mean, f"{len(values)} of {len(found)}"])
    return "\n" + _rows(rows)
