"""Draws the quality over epsilon as an SVG, one line per combination of the other axes. Knows numbers; knows no processes."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from edgelam_fl.bench.matrix import NO_PRIVACY, Matrix
from edgelam_fl.bench.tables import Lines, groups, mean_and_spread, measure_in, quality, title_of
from edgelam_fl.telemetry.measures import MEASURES

_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_W, _PLOT_H = 640, 360, 64, 36, 400, 264
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d6a9f", "#c9822b", "#4f5d75")
_STYLE = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999;fill:none}"
_TICKS = 4

Point = tuple[float, float]  # mean and spread over the seeds


def over_epsilon(matrix: Matrix, lines: Lines) -> str:
    """Returns the plot; "" if the matrix does not vary epsilon, or no cell is finished.

    The places of the epsilons are equally far apart, the least private first; whiskers are the spread over the seeds.
    """
    curves = _curves(matrix, lines)
    if not curves:
        return ""
    reached = [mean + side * spread for curve in curves.values() for mean, spread in curve.values() for side in (-1, 1)]
    low, high = min(reached), max(reached)
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room
    places = {value: _LEFT + _PLOT_W * (n + 0.5) / len(_epsilons(matrix)) for n, value in enumerate(_epsilons(matrix))}
    parts = [f'<rect class="axis" x="{_LEFT}" y="{_TOP}" width="{_PLOT_W}" height="{_PLOT_H}"/>']
    parts += [_label(x, _TOP + _PLOT_H + 18, "middle", _word(value)) for value, x in places.items()]
    parts += [_label(_LEFT + _PLOT_W / 2, _TOP + _PLOT_H + 40, "middle", "epsilon")]
    measure = measure_in(lines)
    parts += [_label(_LEFT, _TOP - 14, "start", title_of(lines))]
    for tick in range(_TICKS + 1):
        value = low + (high - low) * tick / _TICKS
        parts.append(_label(_LEFT - 8, _height(value, low, high) + 4, "end", f"{_printed(value, measure):.3g}"))
    for number, (name, curve) in enumerate(curves.items()):
        parts += _curve(number, name, {places[value]: point for value, point in curve.items()}, low, high)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">'
    )
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, f"<style>{_STYLE}</style>", background, *parts, "</svg>\n"])


def _curves(matrix: Matrix, lines: Lines) -> dict[str, dict[float | str, Point]]:
    """Returns mean and spread by epsilon, for each combination of the other axes that vary."""
    axes = matrix.varied()
    if "epsilon" not in axes:
        return {}
    at = axes.index("epsilon")
    curves: dict[str, dict[float | str, Point]] = {}
    for group, found in groups(matrix, lines).items():
        name = " ".join(str(value) for number, value in enumerate(group) if number != at) or "all"
        curves.setdefault(name, {})[group[at]] = mean_and_spread([quality(line) for line in found])
    return curves


def _epsilons(matrix: Matrix) -> list[float | str]:
    return sorted(matrix.axes.epsilon, key=lambda value: -value if isinstance(value, float) else float("-inf"))


def _curve(number: int, name: str, points: Mapping[float, Point], low: float, high: float) -> list[str]:
    """Draws one line with its points, whiskers and name; lines are moved apart a little, so that whiskers stay legible."""
    colour, moved = _COLOURS[number % len(_COLOURS)], 5 * number
    at = [(x + moved, mean, spread) for x, (mean, spread) in sorted(points.items())]
    path = " ".join(f"{x:.1f},{_height(mean, low, high):.1f}" for x, mean, _ in at)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, mean, spread in at:
        ends = [_height(mean + side * spread, low, high) for side in (-1, 1)]
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{_height(mean, low, high):.1f}" r="3.5" fill="{colour}"/>')
    y = _TOP + 14 + 20 * number
    parts.append(f'<rect x="{_LEFT + _PLOT_W + 20}" y="{y - 9}" width="12" height="10" fill="{colour}"/>')
    return [*parts, _label(_LEFT + _PLOT_W + 38, y, "start", name)]


def _height(value: float, low: float, high: float) -> float:
    return _TOP + _PLOT_H * (high - value) / (high - low)


def _printed(value: float, measure: str) -> float:
    """Turns a quality into the number that people read."""
    of = MEASURES[measure]
    return (100 if of.percent else 1) * (value if of.higher else -value)


def _word(value: float | str) -> str:
    return "no privacy" if value == NO_PRIVACY else f"{value:g}"


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
