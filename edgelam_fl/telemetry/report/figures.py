"""The figures of the report's page as plain data; `charts.js` decides how they are drawn.

A colour is the name of one of the page's CSS variables, light or dark. However long the run was and however many devices it
had, a figure stays small: steps are thinned to means, and of many devices the mean with its spread is drawn alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, zip_longest
from statistics import fmean
from typing import Any

from edgelam_fl.telemetry.events import MeasuredPoint, RoundDone
from edgelam_fl.telemetry.events.rounds import mean_of
from edgelam_fl.telemetry.human import total
from edgelam_fl.telemetry.measures import MEASURES, shown_value, with_unit
from edgelam_fl.telemetry.report.frame import COLOURS
from edgelam_fl.telemetry.report.over_time import OverTime
from edgelam_fl.telemetry.summary import is_training_round, measured, steps_of
from edgelam_fl.telemetry.timeline import Phase
from edgelam_fl.telemetry.verdict import spread_of

FRAMES = {"ACT": "activations", "GRAD": "gradients"}  # every other kind of frame counts as control
BARS_SHOWN = 20_000  # of all timelines together: about 1 MB of the page
LINES_SHOWN = 24  # of more devices, the mean and the spread are drawn alone
NOISE_SHOWN = 4  # of more devices, no line of single steps is drawn
POINTS_SHOWN = 20_000  # of all lines of a figure
COLUMNS_SHOWN = 100  # of a figure of bars; more rounds are drawn as means of several
MEAN, MEAN_COLOUR = "mean over devices", "--ink"
TRAINED, UNTRAINED = "trained model", "before training"

Values = Sequence[float | None]  # a value per step or round; None: there is none


def learning_figures(rounds: Sequence[RoundDone], colours: Mapping[str, str], measure: str) -> dict[str, Any]:
    """Returns the figures of losses and held-out values by the id of their place; empty while no round is closed."""
    if not rounds:
        return {}
    figures = {"quality": _quality_figure(rounds, colours, measure), "loss": _loss_figure(rounds, colours)}
    points = _points_figure(rounds, measure)
    return figures | ({"points": points} if points else {})


def over_time_figure(shown: OverTime) -> dict[str, Any]:
    """Draws a channel over time: slots that are heard up to 0, and predicted ones from 1 on."""
    past, ahead = len(shown.heard), len(shown.after)
    xs = list(range(1 - past, ahead + 1))
    return {
        "x": "slot (up to 0: heard)", "y": "real part, in amplitudes", "whole": True, "dots": True, "marks": [0.5],
        "lines": [
            {"name": "true channel", "color": "--muted", "x": xs, "y": list(shown.true)},
            {"name": "heard, with noise", "color": "--c0", "x": xs[:past], "y": list(shown.heard), "dash": 2},
            {"name": UNTRAINED, "color": "--c1", "x": xs[past:], "y": list(shown.before), "dash": 1},
            {"name": TRAINED, "color": MEAN_COLOUR, "x": xs[past:], "y": list(shown.after), "strong": True},
        ],
    }  # fmt: skip


def cost_figures(rounds: Sequence[RoundDone]) -> dict[str, Any]:
    """Returns the figures of bytes and seconds by the id of their place; empty while no round is closed."""
    return {"bytes": _bytes_figure(rounds), "seconds": _seconds_figure(rounds)} if rounds else {}


def timeline_figures(phases: Sequence[Phase], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the newest rounds' timelines, oldest first: as many as `BARS_SHOWN` allows, at least one."""
    figures: list[dict[str, Any]] = []
    room = BARS_SHOWN
    for phase in reversed(phases):
        room -= sum(map(len, phase.rows.values()))
        if figures and room < 0:
            break
        rows = [
            {"node": node, "role": role, "color": colours.get(node, "--muted"), "bars": own}
            for (node, role), own in phase.rows.items()
        ]
        figures.insert(0, {"round": phase.round, "start": phase.start_s, "end": phase.end_s, "rows": rows})
    return figures


# ---------------------------------------------------------------- what is learned


def losses_by_device(rounds: Iterable[RoundDone]) -> tuple[dict[str, list[float | None]], list[int]]:
    """Returns the loss of each step of the run per device, and the steps that were done at the end of each round.

    Steps are counted on from round to round; a device that was not in a round has None there.
    """
    losses: dict[str, list[float | None]] = {}
    ends, offset = [], 0
    for done in rounds:
        for device in done.devices:
            own = losses.setdefault(device.name, [])
            own += [None] * (offset - len(own)) + list(device.step_losses)
        offset += steps_of(done)
        ends.append(offset)
    return losses, ends


def smoothed(values: Values, window: int) -> list[float | None]:
    """Returns the mean of the `window` values around each, an odd number, as many as there are of them; None for what is not a finite number."""
    known = [value is not None and math.isfinite(value) for value in values]
    sums = [0.0, *accumulate(value or 0.0 if is_known else 0.0 for value, is_known in zip(values, known, strict=True))]
    counts, reach = [0, *accumulate(known)], window // 2
    around = [(max(0, at - reach), min(len(known), at + reach + 1)) for at in range(len(known))]
    return [
        (sums[last] - sums[first]) / (counts[last] - counts[first]) if is_known else None
        for (first, last), is_known in zip(around, known, strict=True)
    ]


def window_of(steps: int) -> int:
    """Returns over how many steps the losses of a run are smoothed, an odd number; 1: not at all."""
    return 2 * (steps // 40) + 3 if steps >= 12 else 1


def mean_line(
    lines: Iterable[Values], xs: Sequence[float], name: str = MEAN, colour: str = MEAN_COLOUR
) -> dict[str, Any]:
    """Draws the mean of several lines, with the spread over them as a band."""
    points = [spread_of(column) for column in zip_longest(*lines)]
    return {
        "name": name, "color": colour, "strong": True, "x": list(xs[: len(points)]),
        "y": [point and point.mean for point in points],
        "low": [point and point.mean - point.spread for point in points],
        "high": [point and point.mean + point.spread for point in points],
    }  # fmt: skip


def _loss_figure(rounds: Sequence[RoundDone], colours: Mapping[str, str]) -> dict[str, Any]:
    """Draws the loss over the run's steps, each device smoothed; `marks` are the aggregations."""
    losses, ends = losses_by_device(rounds)
    window = window_of(ends[-1])
    noisy = losses if len(losses) <= NOISE_SHOWN and window > 1 else {}
    smooth = {name: smoothed(values, window) for name, values in losses.items()}
    every = max(1, -(-(len(noisy) + len(smooth)) * ends[-1] // POINTS_SHOWN))
    xs = range(1, ends[-1] + 1)
    faint = [{**line, "faint": True} for line in _lines(noisy, colours, xs, every) if line["name"] in noisy]
    marks = [end + 0.5 for end in ends if end < ends[-1]]
    return {
        "x": "step", "y": "loss per label", "whole": True, "log_y": True,
        "lines": faint + _lines(smooth, colours, xs, every),
        "marks": marks if len(marks) <= COLUMNS_SHOWN else [],
    }  # fmt: skip


def _quality_figure(rounds: Sequence[RoundDone], colours: Mapping[str, str], measure: str) -> dict[str, Any]:
    """Draws the held-out measure. A round measures the adapter it starts from, so round 1 is at 0 rounds of training."""
    xs, values = held_out_by_device(rounds, measure)
    every = max(1, -(-len(values) * len(xs) // POINTS_SHOWN))
    values = {name: [shown_value(measure, value) for value in own] for name, own in values.items()}
    return {
        "x": "rounds of training", "y": with_unit(measure), "whole": True, "log_y": not MEASURES[measure].over,
        "share": MEASURES[measure].percent,
        "lines": _lines(values, colours, xs, every), "dots": len(xs) <= 40,
    }  # fmt: skip


def _points_figure(rounds: Sequence[RoundDone], measure: str) -> dict[str, Any]:
    """Draws the measure over the axis of its points, over all devices: of the newest model, of the first one, and of each method that
    it is compared with. Empty without points."""
    measured_in = [done for done in rounds if any(device.points for device in done.devices)]
    if not measured_in:
        return {}
    newest = pooled_points(measured_in[-1])
    methods = {who: line for who, line in newest.items() if who}
    lines = [_points_line(who, f"--c{at % COLOURS}", line, measure) for at, (who, line) in enumerate(methods.items())]
    if len(measured_in) > 1 and "" in (first := pooled_points(measured_in[0])):
        lines.append({**_points_line(UNTRAINED, "--muted", first[""], measure), "dash": 1})
    if "" in newest:
        lines.append({**_points_line(TRAINED, MEAN_COLOUR, newest[""], measure), "strong": True})
    return {"x": MEASURES[measure].over, "y": with_unit(measure), "lines": lines, "dots": True}


def pooled_points(done: RoundDone) -> dict[str, dict[float, float | None]]:
    """Returns the means over all devices of a round by who, and there by place, in order.

    A method that was not measured on all values of a place, as zero forcing where users outnumber antennas, has no mean there: it
    would be one over easier cells than the model's.
    """
    found: dict[str, dict[float, list[MeasuredPoint]]] = {}
    for point in sorted(point for device in done.devices for point in device.points):
        found.setdefault(point.who, {}).setdefault(point.at, []).append(point)
    most = {at: sum(point.values for point in points) for at, points in found.get("", {}).items()}
    kept = {
        who: {
            at: mean_of(points)
            for at, points in line.items()
            if sum(point.values for point in points) >= most.get(at, 0)
        }
        for who, line in found.items()
    }
    return {who: line for who, line in kept.items() if line}


def _points_line(name: str, colour: str, line: Mapping[float, float | None], measure: str) -> dict[str, Any]:
    return {"name": name, "color": colour, "x": [*line], "y": [shown_value(measure, value) for value in line.values()]}


def _lines(
    values: Mapping[str, Values], colours: Mapping[str, str], xs: Sequence[float], every: int
) -> list[dict[str, Any]]:
    """Draws a line per device, and their mean if there are several; the means of `every` values in the place of each of them."""
    at = [fmean(group) for group in _groups(xs, every)] if every > 1 else list(xs)
    thin = {name: thinned(values[name], every) for name in dict.fromkeys((*colours, *values)) if name in values}
    lines = [
        {"name": name, "color": colours.get(name, "--muted"), "x": at[: len(ys)], "y": ys} for name, ys in thin.items()
    ]
    mean = [mean_line(thin.values(), at)] if len(thin) > 1 else []
    return [*lines, *mean] if len(lines) <= LINES_SHOWN else mean


def held_out_by_device(rounds: Sequence[RoundDone], measure: str) -> tuple[list[int], dict[str, list[float | None]]]:
    """Returns the rounds of training before each measurement, and the values then per device."""
    names = dict.fromkeys(device.name for done in rounds for device in done.devices)
    found: dict[str, list[float | None]] = {name: [] for name in names}
    for done in rounds:
        values = {device.name: measured(device, measure) for device in done.devices}
        for name in names:
            found[name].append(values.get(name))
    return [done.round - 1 for done in rounds], found


def thinned(values: Values, every: int) -> list[float | None]:
    if every == 1:
        return list(values)
    known = ([value for value in group if value is not None] for group in _groups(values, every))
    return [fmean(group) if group else None for group in known]


# ---------------------------------------------------------------- what it costs


def _bytes_figure(rounds: Sequence[RoundDone]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {kind: [0.0] * len(rounds) for kind in (*FRAMES.values(), "adapters", "control")}
    for i, done in enumerate(rounds):
        for kind, count in done.bytes_by_kind.items():
            stacks[FRAMES.get(kind, "control")][i] += count / 1e6
        for device in done.devices:
            stacks["adapters"][i] += (total((device.adapter_bytes_up, device.adapter_bytes_down)) or 0) / 1e6
    return {"x": "round", "y": "MB", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k2", "--k3"))}


def _seconds_figure(rounds: Sequence[RoundDone]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {"training": [], "evaluation": [], "the rest": []}
    for done in rounds:
        spent = [(device.train_seconds or 0, device.eval_seconds or 0) for device in done.devices]
        training, evaluation = max(spent, key=sum, default=(0, 0))
        rest = max(0, done.seconds - training - evaluation)
        for stack, seconds in zip(stacks.values(), (training, evaluation, rest), strict=True):
            stack.append(seconds)
    return {"x": "round", "y": "seconds", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k3"))}


def _bars(
    rounds: Sequence[RoundDone], stacks: Mapping[str, list[float]], colours: Iterable[str]
) -> list[dict[str, Any]]:
    """Draws a column per round, or per group of rounds with their mean if there are many."""
    every = -(-len(rounds) // COLUMNS_SHOWN)
    names = list(_columns(rounds, every))
    means = {kind: [fmean(group) for group in _groups(values, every)] for kind, values in stacks.items()}
    coloured = zip(means.items(), colours, strict=True)
    return [{"name": kind, "color": colour, "x": names, "y": values} for (kind, values), colour in coloured]


def _groups(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[first : first + size] for first in range(0, len(values), size))


def _columns(rounds: Sequence[RoundDone], every: int) -> Iterator[str]:
    for group in _groups(rounds, every):
        numbers = dict.fromkeys(
            str(done.round) if is_training_round(done) else "evaluation" for done in (group[0], group[-1])
        )
        yield "-".join(numbers)
