"""The frame of all pages: one file without network access, with the looks, the charts and the figures that they draw.

The page's own policy forbids it to load anything. `looks.css` holds the colours and sizes, light and dark, `charts.js` draws
figures as SVG. Knows nothing of runs and benchmarks; texts come escaped, and names in figures stay plain text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PARTS = Path(__file__).parent
COLOURS = 12  # --c0 to --c11 in looks.css


def framed(title: str, body: str, figures: Mapping[str, Any], scripts: Iterable[str] = ()) -> str:
    """Returns a page. title, body: HTML. figures: by the id of their place in the body. scripts: run after the charts are drawn."""
    parts = {
        "title": title,
        "looks": part("looks.css"),
        "body": body,
        "figures": as_script(figures),
        "scripts": "\n".join([part("charts.js"), *scripts]),
    }
    return filled(part("frame.html"), parts)


def part(name: str) -> str:
    """Returns the text of a file beside this one."""
    return (PARTS / name).read_text(encoding="utf-8")


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Returns a template with its {{names}} replaced. What a part holds is not replaced again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def as_script(value: Any) -> str:
    """Returns JSON for a script element: no text in it can end the element, and no number is nan or infinite."""
    return json.dumps(finite(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def finite(value: Any) -> Any:
    """Returns the value with None for nan and infinities (a run that diverged has them), and six digits of every number."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return _short(value) if math.isfinite(value) else None
    return value


def _short(value: float) -> float | int:
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() else rounded


def table(title: str, headings: str, rows: Iterable[list[str]], style: str = "") -> str:
    """Draws a table of cells that are HTML already, under its title; empty without rows. headings: divided by "|"."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{heading}</th>" for heading in headings.split("|"))
    heading = f"<h2>{title}</h2>" if title else ""
    return f'{heading}<div class="scroll"><table class="{style}"><tr>{head}</tr>{body}</table></div>' if body else ""


def figure(name: str, title: str, caption: str, tall: str = "") -> str:
    """Returns the place of a figure on a page; its id in the figures is `name`. tall: "tall" for one that needs room."""
    return f'<figure class="card"><h2>{title}</h2><figcaption>{caption}</figcaption><div class="plot {tall}" id="{name}"></div></figure>'


def exact(value: float | None, shown: str, unit: str = "") -> str:
    """Shows a rounded value, with the exact one in its tooltip."""
    return shown if value is None else f'<span title="{value}{unit}">{shown}</span>'
