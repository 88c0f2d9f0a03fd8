"""Draws measurements as bars with their lowest and highest value, as SVG text. Knows numbers and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median

_LEFT, _BAR_W, _RIGHT, _ROW, _TOP = 330, 380, 110, 26, 44
_COLOURS = ("#1b6ca8", "#8d6a9f")  # ours, others
_STYLE = "text{font:12px sans-serif;fill:#333}"


def bars(title: str, unit: str, rows: Mapping[str, Sequence[float]], ours: Sequence[str]) -> str:
    """Returns a plot with a bar per row: the median of its values, with whiskers. `ours`: the rows of the first colour."""
    most = max(max(values) for values in rows.values())
    height = _TOP + _ROW * len(rows) + 12
    width = _LEFT + _BAR_W + _RIGHT
    parts = [f'<text x="12" y="24" font-weight="bold">{escape(title)} ({escape(unit)})</text>']
    for number, (name, values) in enumerate(rows.items()):
        y, scale = _TOP + _ROW * number, _BAR_W / most
        middle = median(values)
        low, high = _LEFT + scale * min(values), _LEFT + scale * max(values)
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y + 3}" width="{scale * middle:.1f}" height="15" fill="{_COLOURS[name not in ours]}"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 10.5}" y2="{y + 10.5}" stroke="#333"/>',
            f'<text x="{high + 8:.1f}" y="{y + 14}">{middle:.3g}</text>',
        ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join(
        [head, f"<style>{_STYLE}</style>", '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"]
    )
