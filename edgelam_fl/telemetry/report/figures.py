"""The figures of the report's page as plain data: what to draw, not how; `page.html` draws them.

A colour is the name of one of the page's CSS variables, light or dark. Numbers stay as the events give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from edgelam_fl.telemetry.summary import ADAPTER_BYTES, Event, is_training_round, measured, total
from edgelam_fl.telemetry.timeline import Phase

FRAMES = {"ACT": "activations", "GRAD": "gradients"}  # every other kind of frame counts as control
BARS_SHOWN = 30_000  # of all timelines together: about 1.5 MB of the page


def round_figures(rounds: list[Event], colours: Mapping[str, str], measure: str) -> dict[str, Any]:
    """By the id of their place on the page; empty while no round is closed."""
    if not rounds:
        return {}
    figures = {
        "loss": _loss_figure(rounds, colours),
        "quality": _quality_figure(rounds, colours, measure),
        "bytes": _bytes_figure(rounds),
        "seconds": _seconds_figure(rounds),
    }
    return finite(figures)


def timeline_figures(phases: list[Phase], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """The newest rounds, as many as `BARS_SHOWN` allows and one at least, oldest first."""
    figures: list[dict[str, Any]] = []
    room = BARS_SHOWN
    for phase in reversed(phases):
        room -= sum(map(len, phase.rows.values()))
        if figures and room < 0:
            break
        rows = [
            {"node": node, "role": role, "color": colours.get(node, "--muted"), "bars": [[i[0], *i[2:7]] for i in own]}
            for (node, role), own in phase.rows.items()
        ]
        figures.insert(0, {"round": phase.round, "start": phase.start_s, "end": phase.end_s, "rows": rows})
    return finite(figures)


def _loss_figure(rounds: list[Event], colours: Mapping[str, str]) -> dict[str, Any]:
    """Loss a device over the run's steps, counted on from round to round; `marks` are the aggregations between."""
    points: dict[str, list[tuple[float, Any]]] = {name: [] for name in colours}
    marks, offset = [], 0
    for round_done in rounds:
        losses = {device["name"]: device.get("step_losses") or [] for device in round_done.get("devices") or []}
        for name, values in losses.items():
            points.setdefault(name, []).extend(enumerate(values, start=offset + 1))
        offset += max(map(len, losses.values()), default=0)
        marks.append(offset + 0.5)
    return {
        "x": "step",
        "y": "loss a label (nats)",
        "lines": _lines(points, colours),
        "marks": [x for x in marks if x < offset],
    }


def _quality_figure(rounds: list[Event], colours: Mapping[str, str], measure: str) -> dict[str, Any]:
    """A round measures the adapter that it starts from, so round 1 stands at 0 rounds of training."""
    points: dict[str, list[tuple[float, Any]]] = {name: [] for name in colours}
    for round_done in rounds:
        for device in round_done.get("devices") or []:
            points.setdefault(device["name"], []).append((round_done["round"] - 1, measured(device, measure)))
    lines = _lines(points, colours)
    return {"x": "rounds of training", "y": measure, "lines": lines, "dots": True, "share": measure == "accuracy"}


def _bytes_figure(rounds: list[Event]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {kind: [0.0] * len(rounds) for kind in (*FRAMES.values(), "adapters", "control")}
    for i, round_done in enumerate(rounds):
        for kind, count in (round_done.get("bytes_by_kind") or {}).items():
            stacks[FRAMES.get(kind, "control")][i] += count / 1e6
        for device in round_done.get("devices") or []:
            stacks["adapters"][i] += (total(device.get(key) for key in ADAPTER_BYTES) or 0) / 1e6
    return {"x": "round", "y": "megabytes (MB)", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k2", "--k3"))}


def _seconds_figure(rounds: list[Event]) -> dict[str, Any]:
    stacks: dict[str, list[float]] = {"training": [], "evaluation": [], "the rest": []}
    for round_done in rounds:
        spent = [(d.get("train_seconds") or 0, d.get("eval_seconds") or 0) for d in round_done.get("devices") or []]
        training, evaluation = max(spent, key=sum, default=(0, 0))
        rest = max(0, (round_done.get("seconds") or 0) - training - evaluation)
        for stack, seconds in zip(stacks.values(), (training, evaluation, rest), strict=True):
            stack.append(seconds)
    return {"x": "round", "y": "seconds (s)", "bars": _bars(rounds, stacks, ("--k0", "--k1", "--k3"))}


def _lines(points: Mapping[str, list[tuple[float, Any]]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    named = {name: list(zip(*own, strict=True)) or [(), ()] for name, own in points.items()}
    return [
        {"name": escape(name, quote=False), "color": colours.get(name, "--muted"), "x": xs, "y": ys}
        for name, (xs, ys) in named.items()
    ]


def _bars(rounds: list[Event], stacks: Mapping[str, list[float]], colours: Iterable[str]) -> list[dict[str, Any]]:
    names = [str(event["round"]) if is_training_round(event) else "evaluation" for event in rounds]
    coloured = zip(stacks.items(), colours, strict=True)
    return [{"name": kind, "color": colour, "x": names, "y": values} for (kind, values), colour in coloured]


def finite(value: Any) -> Any:
    """Without nan and infinities (a run that diverged has them), which JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
