"""The split as an SVG: which layers stand where. A part of the report's page, whose CSS gives it its colours.

Layers run from left to right, a route a row, so unlike cuts stand at unlike places. Every place where some route is cut
is a column's edge; columns grow with their layers, and never get too narrow for what is written in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

from edgelam_fl.telemetry.summary import Event, by_name, human_layers, of_kind, setting

ROW_HEIGHT, GAP_X, GAP_Y, SITE_GAP = 50, 44, 14, 22  # pixels
TEXT_SHORT = 13  # letters that fit into BOX_WIDTH
END_WIDTH, BOX_WIDTH, COLUMN_WIDTH, LAYERS_WIDTH = 186, 116, 24, 520
_LABELS_LEAVE = {"device": False, "last-stage": True}  # by the word that the run's events give for split.labels
EMBEDDING = -1  # stands before layer 0; the head stands after the last layer, as one more


@dataclass
class Shape:
    """A node's layers, over the rows of the routes that share them: from `row` on, a [first, last) each."""

    node: str
    row: int
    spans: list[tuple[int, int]]
    text: str = ""
    own: bool = False  # a device's ends

    def meets(self, node: str, row: int, first: int, last: int) -> bool:
        above, below = self.spans[-1]
        return self.node == node and row == self.row + len(self.spans) and first < below and above < last


@dataclass
class Grid:
    """Where columns and rows stand."""

    left: dict[int, int] = field(default_factory=dict)  # of the column that begins at a layer
    right: dict[int, int] = field(default_factory=dict)  # of the column that ends at a layer
    top: list[int] = field(default_factory=list)
    width: int = 0
    height: int = 0


def split_picture(events: list[dict[str, Any]], colours: Mapping[str, str]) -> str:
    """The latest plan: a row a device with its ends, between them the hosts on its way; neighbours share a host's box."""
    plans = [plan for plan in of_kind(events, "plan") if plan.get("routes")]
    if not plans:
        return "<p>No plan was made.</p>"
    routes = sorted(plans[-1]["routes"], key=lambda route: (_chain(route), by_name(route["device"])))
    given_away = labels_leave(events)
    shapes = [*_ends(routes, given_away), *_slices(routes, given_away)]
    grid = _grid(routes, shapes)
    ways = [_arrows(grid, row, cut) for row, route in enumerate(routes) for cut in _cuts(route, given_away)]
    drawn = "".join([*ways, *(_draw(shape, grid, colours) for shape in shapes)])
    size_and_role = f'width="{grid.width + 4}" viewBox="-2 -2 {grid.width + 4} {grid.height + 4}" role="img"'
    return f'<svg {size_and_role} aria-label="which layers stand where">{drawn}</svg>'


def labels_leave(events: Iterable[Event]) -> bool:
    """Whether the last host holds the head and sees the labels."""
    return _LABELS_LEAVE.get(str(setting(next(of_kind(events, "run_started"), {}), "split", "labels")), False)


def _hops(route: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return route.get("hops") or []


def _chain(route: Mapping[str, Any]) -> list[Any]:
    return [by_name(hop["node"]) for hop in _hops(route)]


def _cuts(route: Mapping[str, Any], given_away: bool) -> list[int]:
    hops = _hops(route)
    return [*(hop["first"] for hop in hops), *(hop["last"] for hop in hops[-1:] if not given_away)]


def _ends(routes: Sequence[Mapping[str, Any]], given_away: bool) -> Iterable[Shape]:
    """What the devices keep: the whole model where a route has no host."""
    for row, route in enumerate(routes):
        name, layers = route["device"], route["num_layers"]
        if not _hops(route):
            yield Shape(name, row, [(EMBEDDING, layers + 1)], f"the whole model, {human_layers((0, layers))}", own=True)
            continue
        front, back = _and_layers(0, route["front"]), _and_layers(route["back_first"], layers)
        yield Shape(name, row, [(EMBEDDING, route["front"])], f"embedding{front}", own=True)
        if not given_away:
            yield Shape(name, row, [(route["back_first"], layers + 1)], f"head, loss{back}", own=True)


def _slices(routes: Sequence[Mapping[str, Any]], given_away: bool) -> list[Shape]:
    """The hosts; routes one below the other that cross the same slice share a shape."""
    shapes: list[Shape] = []
    for row, route in enumerate(routes):
        for hop in _hops(route):
            span = (hop["first"], hop["last"])
            above = next((shape for shape in shapes if shape.meets(hop["node"], row, *span)), None)
            if above is None:
                shapes.append(Shape(hop["node"], row, [span]))
            else:
                above.spans.append(span)
    for shape in shapes:
        firsts, lasts = zip(*shape.spans, strict=True)
        head = ", head, loss" if given_away and max(lasts) == routes[shape.row]["num_layers"] else ""
        shape.text = f"{human_layers((min(firsts), max(lasts)))}{head}"
    return shapes


def _and_layers(first: int, last: int) -> str:
    return f", {human_layers((first, last))}" if last > first else ""


def _grid(routes: Sequence[Mapping[str, Any]], shapes: Sequence[Shape]) -> Grid:
    layers = max(route["num_layers"] for route in routes)
    edges = sorted({edge for shape in shapes for span in shape.spans for edge in span})
    columns = list(pairwise(edges))
    widths = [max(COLUMN_WIDTH, LAYERS_WIDTH * (last - first) // layers) for first, last in columns]
    for shape in shapes:
        for span in shape.spans:
            held = [i for i, (first, last) in enumerate(columns) if span[0] <= first and last <= span[1]]
            missing = (
                (BOX_WIDTH if len(shape.text) < TEXT_SHORT else END_WIDTH)
                - sum(widths[i] for i in held)
                - GAP_X * (len(held) - 1)
            )
            widths[held[0] if span[0] == EMBEDDING else held[-1]] += max(0, missing)
    grid, x, y = Grid(), 0, 0
    for (first, last), width in zip(columns, widths, strict=True):
        grid.left[first], grid.right[last] = x, x + width
        x += width + GAP_X
    for row, route in enumerate(routes):
        y += SITE_GAP if row and _chain(route) != _chain(routes[row - 1]) else 0
        grid.top.append(y)
        y += ROW_HEIGHT + GAP_Y
    grid.width, grid.height = x - GAP_X, y - GAP_Y
    return grid


def _draw(shape: Shape, grid: Grid, colours: Mapping[str, str]) -> str:
    """A box with its name and layers; a staircase where the routes enter or leave at unlike layers."""
    sides = [(grid.left[first], grid.right[last]) for first, last in shape.spans]
    tops = grid.top[shape.row : shape.row + len(shape.spans)]
    top, bottom = tops[0], tops[-1] + ROW_HEIGHT
    halves = sides[(len(sides) - 1) // 2 : len(sides) // 2 + 1]  # the rows that the middle stands in
    x, middle = max(left for left, _ in halves) + 12, (top + bottom) // 2
    colour = colours.get(shape.node, "--muted")
    room = (min(right for _, right in halves) - x - 4) // 8
    name = shape.node if len(shape.node) <= room else f"{shape.node[: room - 1]}…"
    return (
        f'<g class="{"own" if shape.own else "host"}" style="color: var({colour})">'
        f"<title>{escape(shape.node)}: {escape(shape.text)}</title>"
        f"{_outline(sides, tops)}"
        f'<text class="name" x="{x}" y="{middle - 4}">{escape(name)}</text>'
        f'<text class="small" x="{x}" y="{middle + 14}">{escape(shape.text)}</text></g>'
    )


def _outline(sides: Sequence[tuple[int, int]], tops: Sequence[int]) -> str:
    """Around rows that stand one below the other, each with its own left and right side."""
    (left, right), height = sides[0], tops[-1] + ROW_HEIGHT - tops[0]
    if len(set(sides)) == 1:
        return f'<rect class="box" x="{left}" y="{tops[0]}" width="{right - left}" height="{height}" rx="6"/>'
    steps = [top - GAP_Y // 2 for top in tops[1:]]
    down = "".join(f"V{y}H{right}" for y, (_, right) in zip(steps, sides[1:], strict=True))
    up = "".join(f"V{y}H{left}" for y, (left, _) in reversed(list(zip(steps, sides[:-1], strict=True))))
    return f'<path class="box" d="M{left} {tops[0]}H{right}{down}v{tops[0] + height - steps[-1]}H{sides[-1][0]}{up}Z"/>'


def _arrows(grid: Grid, row: int, cut: int) -> str:
    """Activations there, gradients back."""
    left, right = grid.right[cut] + 4, grid.left[cut] - 4
    there = grid.top[row] + ROW_HEIGHT // 2 - 6
    back = there + 12
    return (
        f'<path class="way" d="M{left} {there}H{right}m-6 -4l6 4l-6 4M{left + 6} {back - 4}l-6 4l6 4"/>'
        f'<path class="way back" d="M{right} {back}H{left}"/>'
    )
