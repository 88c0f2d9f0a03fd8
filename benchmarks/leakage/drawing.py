"""Draws shares in per cent as an SVG of panels beside each other, with one legend. Knows no attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_PANEL, _HEIGHT, _LEFT, _TOP, _GAP = 330, 260, 50, 40, 70
_COLOURS = ("#888888", "#1b6ca8", "#2e8b57", "#e08e0b", "#8e44ad", "#d1495b", "#111111", "#17a2a2")


@dataclass(frozen=True)
class Panel:
    """One plot: of each name a line of points (x, per cent)."""

    title: str
    axis: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel]) -> str:
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    width, height = _LEFT + len(panels) * (_PANEL + _GAP), _TOP + _HEIGHT + 60 + 18 * len(names)
    style = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999;fill:none}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{style}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _plot(panel, _LEFT + number * (_PANEL + _GAP), colours)
    for number, name in enumerate(names):
        y = _TOP + _HEIGHT + 60 + 18 * number
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{colours[name]}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{_LEFT + 32}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _plot(panel: Panel, left: int, colours: Mapping[str, str]) -> list[str]:
    xs = sorted({x for line in panel.lines.values() for x, _ in line})
    most = max(xs[-1], 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / most * _PANEL, _TOP + _HEIGHT * (1 - y / 100)

    parts = [
        f'<text x="{left}" y="{_TOP - 14}">{escape(panel.title)}</text>',
        f'<rect class="axis" x="{left}" y="{_TOP}" width="{_PANEL}" height="{_HEIGHT}"/>',
        f'<text x="{left + _PANEL / 2}" y="{_TOP + _HEIGHT + 34}" text-anchor="middle">{escape(panel.axis)}</text>',
    ]
    for y in (0, 25, 50, 75, 100):
        parts.append(f'<text x="{left - 6}" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y}</text>')
    for x in xs:
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{x:g}</text>')
    for name, line in panel.lines.items():
        points = [at(x, y) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>' for x, y in points]
    return parts
