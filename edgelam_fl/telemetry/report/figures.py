"""The figures of the report's page as plain data; `page.html` decides how they are drawn.

A colour is the name of one of the page's CSS variables, light or dark. Numbers stay as the events give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from edgelam_fl.telemetry.events import RoundDone
from edgelam_fl.telemetry.human import total
from edgelam_fl.telemetry.summary import is_training_round, measured
from edgelam_fl.telemetry.timeline import Phase

FRAMES = {"ACT": "activations", "GRAD": "gradients"}  # every other kind of frame counts as control
BARS_SHOWN = 30_000  # of all timelines together: about 1.5 MB of the page


def round_figures(rounds: Sequence[RoundDone], colours: Mapping[str, str], measure: str) -> dict[str, Any]:
    """Returns the figures by the id of their place on the page; empty while no round is closed."""
    if not rounds:
        return {}
    figures = {
        "loss": _loss_figure(rounds, colours),
        "quality": _quality_figure(rounds, colours, measure),
        "bytes": _bytes_figure(rounds),
        "seconds": _seconds_figure(rounds),
    }
    return finite(figures)


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
    return finite(figures)


def _loss_figure(rounds: Iterable[RoundDone], colours: Mapping[str, str]) -> dict[str, Any]:
    """Draws the loss per device over the run's steps, counted on from round to round; `marks` are the aggregations."""
    points: dict[str, list[tuple[float, Any]]] = {name: [] for name in colours}
    marks, offset = [], 0
    for done in rounds:
        for device in done.devices:
            points.setdefault(device.name, []).extend(enumerate(device.step_losses, start=offset + 1))
        offset += max((len(device.step_losses) for device in done.devices), default=0)
        marks.append(offset + 0.5)
    return {
        "x": "step",
        "y": "loss a label (nats)",
        "lines": _lines(points, colours),
        "marks": [x for x in marks if x < offset],
    }


def _quality_figure(rounds: Iterable[RoundDone], colours: Mapping[str, str], measure: str) -> dict[str, Any]:
    """Draws the held-out measure. A round measures the adapter it starts from, so round 1 is at 0 rounds of training."""
    points: dict[str, list[tuple[float, Any]]] = {name: [] for name in colours}
    for done in rounds:
        for device in done.devices:
            points.setdefault(device.name, []).append((done.round - 1, measured(device, measure)))
    lines = _lines(points, colours)
    return {"x": "rounds of training", "y": measure, "lines": lines, "dots": True, "share": measure == "accuracy"}


def _bytes_figure(rounds: Sequence[RoundDone]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {kind: [0.0] * len(rounds) for kind in (*FRAMES.values(), "adapters", "control")}
    for i, done in enumerate(rounds):
        for kind, count in done.bytes_by_kind.items():
            stacks[FRAMES.get(kind, "control")][i] += count / 1e6
        for device in done.devices:
            stacks["adapters"][i] += (total((device.adapter_bytes_up, device.adapter_bytes_down)) or 0) / 1e6
    return {"x": "round", "y": "megabytes (MB)", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k2", "--k3"))}


def _seconds_figure(rounds: Sequence[RoundDone]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {"training": [], "evaluation": [], "the rest": []}
    for done in rounds:
        spent = [(device.train_seconds or 0, device.eval_seconds or 0) for device in done.devices]
        training, evaluation = max(spent, key=sum, default=(0, 0))
        rest = max(0, done.seconds - training - evaluation)
        for stack, seconds in zip(stacks.values(), (training, evaluation, rest), strict=True):
            stack.append(seconds)
    return {"x": "round", "y": "seconds (s)", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k3"))}


def _lines(points: Mapping[str, list[tuple[float, Any]]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    named = {name: list(zip(*own, strict=True)) or [(), ()] for name, own in points.items()}
    return [
        {"name": escape(name, quote=False), "color": colours.get(name, "--muted"), "x": xs, "y": ys}
        for name, (xs, ys) in named.items()
    ]


def _bars(
    rounds: Iterable[RoundDone], stacks: Mapping[str, list[float]], colours: Iterable[str]
) -> list[dict[str, Any]]:
    names = [str(done.round) if is_training_round(done) else "evaluation" for done in rounds]
    coloured = zip(stacks.items(), colours, strict=True)
    return [{"name": kind, "color": colour, "x": names, "y": values} for (kind, values), colour in coloured]


def finite(value: Any) -> Any:
    """Returns the value with None for nan and infinities (a run that diverged has them), which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
