"""Compares the cells of a matrix and writes tables in Markdown, from the lines of its cells. Knows no processes.

Accuracies are compared seed by seed: both runs of a pair had the same data, dealt alike, and started from the same adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

from edgelam_fl.bench.matrix import Cell, Matrix

Lines = Mapping[str, Mapping[str, Any]]  # the newest line of each cell and reference, by name
Group = tuple[Any, ...]  # a value per varied axis, without the seed: one row of a table
COSTS = {"bytes": "MB", "virtual_seconds": "virtual s", "joules": "J"}
_SCALE = {"bytes": 1e6, "virtual_seconds": 1.0, "joules": 1.0}


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


def quality(line: Mapping[str, Any]) -> float:
    """Returns a number of which higher is better: the accuracy, or the negative perplexity."""
    if line["accuracy"] is not None:
        return float(line["accuracy"])
    return -float(line["perplexity"])


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation; the deviation of one value is 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def differences(matrix: Matrix, lines: Lines) -> dict[Group, list[float]]:
    """Returns each group's quality minus the baseline's, seed by seed, all else equal. Groups without a pair are absent."""
    axes = matrix.varied() or ["aggregation"]
    by_key = {
        (Cell(line["cell"]).same_but(matrix.compared), line["cell"][matrix.compared]): line
        for line in lines.values()
        if line["state"] == "done"
    }
    found: dict[Group, list[float]] = {}
    for (rest, value), line in by_key.items():
        base = by_key.get((rest, matrix.bench.baseline))
        if base is not None and value != matrix.bench.baseline:
            found.setdefault(tuple(line["cell"][axis] for axis in axes), []).append(quality(line) - quality(base))
    return found


# ---------------------------------------------------------------- tables


def markdown(matrix: Matrix, lines: Lines) -> str:
    """Returns the results as Markdown: tables, what differs beyond the spread, references, protocols, failures."""
    parts = [f"# {matrix.name}\n", _about(matrix, lines), _table(matrix, lines), _sentences(matrix, lines)]
    parts += [_references(lines), _protocols(matrix, lines), _failures(lines)]
    return "\n".join(part for part in parts if part)


def _about(matrix: Matrix, lines: Lines) -> str:
    bench, done = matrix.bench, sum(line["state"] == "done" for line in lines.values())
    text = (
        f"{done} of {len(matrix.cells())} cells. {bench.dataset}, {bench.examples or 'all'} examples, {bench.test:.0%} of them "
        f"measured, the rest dealt to {bench.devices} devices; seeds {', '.join(map(str, matrix.axes.seed))}. The spread is the "
        f"sample standard deviation over the seeds; differences are taken seed by seed.\n"
    )
    if any(line.get("personal") for line in lines.values()):
        text += (
            "\nWhere devices keep an adapter of their own, each measures its own on its equal part of the common test set, and "
            "the mean is shown: how well a device's own adapter does on everybody's texts.\n"
        )
    return text


def _table(matrix: Matrix, lines: Lines) -> str:
    axes = matrix.varied() or ["aggregation"]
    apart = differences(matrix, lines)
    percent = all(line["accuracy"] is not None for line in lines.values() if line["state"] == "done")
    name = "accuracy, %" if percent else "perplexity"
    costs = [cost for cost in COSTS if any(line.get(cost) for line in lines.values())]
    heads = [*axes, name, "spread", f"less {matrix.bench.baseline}", "spread of it", "aggregation error"]
    rows = [heads + [COSTS[cost] for cost in costs], ["---"] * (len(heads) + len(costs))]
    for group, found in groups(matrix, lines).items():
        scale = 100 if percent else 1
        row = [str(value) for value in group] + _shown([scale * abs(quality(line)) for line in found], "")
        row += _shown([scale * apart_by for apart_by in apart.get(group, [])], "+")
        errors = [line["aggregation_error"] for line in found if line["aggregation_error"] is not None]
        row.append(f"{fmean(errors):.3g}" if errors else "")
        row += [f"{fmean(line[cost] for line in found) / _SCALE[cost]:.1f}" for cost in costs]
        rows.append(row)
    return _rows(rows)


def _shown(values: list[float], sign: str) -> list[str]:
    """Formats mean and spread as two table cells; one value has no spread."""
    if not values:
        return ["", ""]
    mean, spread = mean_and_spread(values)
    return [f"{mean:{sign}.2f}", f"{spread:.2f}" if len(values) > 1 else ""]


def _rows(rows: Iterable[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _sentences(matrix: Matrix, lines: Lines) -> str:
    """Names the differences that are larger than the spread over the seeds."""
    beyond, within = [], []
    for group, pairs in differences(matrix, lines).items():
        mean, spread = mean_and_spread(pairs)
        name = " ".join(str(value) for value in group)
        if len(pairs) > 1 and abs(mean) > spread:
            beyond.append(f"{name} ({100 * mean:+.2f} points)" if _is_accuracy(lines) else f"{name} ({mean:+.2f})")
        else:
            within.append(name)
    if not beyond and not within:
        return ""
    if len(matrix.axes.seed) < 2:
        return "\nOne seed: the spread over seeds is not known, so no difference is called one.\n"
    return (
        f"\nBeyond the spread of the paired differences to {matrix.bench.baseline}: {', '.join(beyond) or 'none'}.\n"
        f"Within it, so these seeds do not separate them: {', '.join(within) or 'none'}.\n"
    )


def _is_accuracy(lines: Lines) -> bool:
    return all(line["accuracy"] is not None for line in lines.values() if line["state"] == "done")


def _references(lines: Lines) -> str:
    found = [line for line in lines.values() if line["state"] == "reference"]
    if not found:
        return ""
    rows = [["reference line", "accuracy, %"], ["---", "---"]]
    return "\n" + _rows(rows + [[str(line["what"]), f"{100 * line['accuracy']:.2f}"] for line in found])


def _failures(lines: Lines) -> str:
    failed = [f"- {name}: {line['reason']}\n" for name, line in lines.items() if line["state"] == "failed"]
    return "\nFailed cells:\n\n" + "".join(failed) if failed else ""


# ---------------------------------------------------------------- protocols


def at_budget(line: Mapping[str, Any], cost: str, budget: float) -> float | None:
    """Returns the last quality that was measured before the budget was spent; None: none was."""
    within = [point for point in line["curve"] if point[cost] <= budget]
    return quality({"accuracy": None, "perplexity": None, **within[-1]}) if within else None


def cost_to(line: Mapping[str, Any], cost: str, target: float) -> float | None:
    """Returns the cost when the quality first reached the target; None: it never did."""
    for point in line["curve"]:
        if quality({"accuracy": None, "perplexity": None, **point}) >= target:
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
        rows.append([*map(str, group), mean, f"{len(values)} of {len(found)}"])
    return "\n" + _rows(rows)
