"""Draws a sequence diagram as SVG, from the part of Mermaid's language that the pages use.

Code hosts draw Mermaid's blocks themselves; the site must not load a program from another server for it. Knows
`participant X as text`, `A->>B: text` (dashed with `-->>`), `Note over A,B: text`, and `opt text` ... `end`.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from html import escape

_LANE, _ROW, _TOP, _MARGIN, _NOTE = 420, 34, 78, 190, 300  # pixels
_PARTICIPANT = re.compile(r"participant (\w+)(?: as (.+))?")
_ARROW = re.compile(r"(\w+)(--?)>>(\w+): (.+)")
_NOTE_OVER = re.compile(r"Note over (\w+)(?:,(\w+))?: (.+)")


@dataclass
class _Drawing:
    lanes: dict[str, int] = field(default_factory=dict)
    """x of each participant, by its short name."""
    parts: list[str] = field(default_factory=list)
    y: int = _TOP
    opened: list[tuple[int, str]] = field(default_factory=list)
    """y and text of each `opt` that has no `end` yet."""

    @property
    def width(self) -> int:
        return 2 * _MARGIN + _LANE * (len(self.lanes) - 1)


def svg(text: str) -> str:
    """Returns one line of SVG without blank lines, so that it may stand in Markdown. Raises ValueError for other lines."""
    drawing = _Drawing()
    for line in map(str.strip, text.strip().splitlines()):
        if line != "sequenceDiagram":
            _draw(drawing, line)
    height = drawing.y + 16
    lanes = "".join(
        f'<line x1="{x}" y1="{_TOP - 22}" x2="{x}" y2="{height - 8}" stroke-opacity=".35"/>'
        for x in drawing.lanes.values()
    )
    return (
        f'<div class="sequence"><svg viewBox="0 0 {drawing.width} {height}" width="{drawing.width}" height="{height}" role="img" '
        f'fill="none" stroke="currentColor" font-size="13"><defs><marker id="arrow" markerWidth="9" markerHeight="8" refX="8" refY="4" '
        f'orient="auto"><path d="M0,0 L9,4 L0,8 z" fill="currentColor" stroke="none"/></marker></defs>'
        f"{lanes}{''.join(drawing.parts)}</svg></div>"
    )


def _draw(drawing: _Drawing, line: str) -> None:
    if match := _PARTICIPANT.fullmatch(line):
        x = drawing.lanes[match[1]] = _MARGIN + _LANE * len(drawing.lanes)
        for number, words in enumerate(textwrap.wrap(match[2] or match[1], 44)):
            drawing.parts.append(_words(x, 18 + 17 * number, words, weight="bold" if number == 0 else "normal"))
    elif match := _ARROW.fullmatch(line):
        start, end = drawing.lanes[match[1]], drawing.lanes[match[3]]
        dashes = ' stroke-dasharray="5 4"' if match[2] == "--" else ""
        drawing.parts.append(_words((start + end) // 2, drawing.y + 12, match[4]))
        drawing.parts.append(
            f'<line x1="{start}" y1="{drawing.y + 19}" x2="{end}" y2="{drawing.y + 19}" marker-end="url(#arrow)"{dashes}/>'
        )
        drawing.y += _ROW
    elif match := _NOTE_OVER.fullmatch(line):
        places = [drawing.lanes[name] for name in match.groups()[:2] if name]
        left, right = min(places) - _NOTE // 2, max(places) + _NOTE // 2
        drawing.parts.append(
            f'<rect x="{left}" y="{drawing.y}" width="{right - left}" height="{_ROW - 8}" rx="4" fill="currentColor" '
            f'fill-opacity=".08" stroke-opacity=".3"/>'
        )
        drawing.parts.append(_words((left + right) // 2, drawing.y + 17, match[3]))
        drawing.y += _ROW
    elif line.startswith("opt "):
        drawing.opened.append((drawing.y, line.removeprefix("opt ")))
        drawing.y += 24
    elif line == "end" and drawing.opened:
        top, words = drawing.opened.pop()
        drawing.parts.append(
            f'<rect x="10" y="{top}" width="{drawing.width - 20}" height="{drawing.y - top}" rx="4" stroke-opacity=".4" '
            f'stroke-dasharray="2 3"/>'
        )
        drawing.parts.append(_words(20, top + 17, f"only if {words}", anchor="start"))
        drawing.y += 10
    elif line:
        raise ValueError(f"a sequence diagram with the line {line!r}, which tools/sequence.py does not know")


def _words(x: int, y: int, words: str, *, anchor: str = "middle", weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="currentColor" stroke="none">'
        f"{escape(words)}</text>"
    )
