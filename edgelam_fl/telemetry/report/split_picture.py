"""The split as an SVG: which node holds which layers. A part of the report's page, whose CSS gives it its colours.

Layers run from left to right, one row per route, so different cuts are at different places. Every layer at which some route
is cut is the edge of a column; columns grow with their layers, and are never too narrow for the text in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from edgelam_fl.telemetry.events import Event, PlanMade, RoutePicture, of_kind
from edgelam_fl.telemetry.human import by_name, human_layers
from edgelam_fl.telemetry.summary import setting

ROW_HEIGHT, GAP_X, GAP_Y, SITE_GAP = 50, 44, 14, 22  # pixels
TEXT_SHORT = 13  # letters that fit into BOX_WIDTH
END_WIDTH, BOX_WIDTH, COLUMN_WIDTH, LAYERS_WIDTH = 186, 116, 24, 520
_WITH_HEAD = {"device": False, "last-stage": True}  # per value of the run file's split.labels
EMBEDDING = -1  # comes before layer 0; the head comes after the last layer, as one more


@dataclass
class LayerBox:
    """A node's layers, over the rows of the routes that share them: one span [first, last) per row, from `row` on."""

    node: str
    row: int
    spans: list[tuple[int, int]]
    text: str = ""
    own: bool = False  # a device's ends

    def meets(self, node: str, row: int, first: int, last: int) -> bool:
        above, below = self.spans[-1]
        return self.node == node and row == self.row + len(self.spans) and first < below and above < last


@dataclass
class PictureGrid:
    """The places of columns and rows, in pixels."""

    left: dict[int, int] = field(default_factory=dict)  # left edge of the column that begins at a layer
    right: dict[int, int] = field(default_factory=dict)  # right edge of the column that ends at a layer
    top: list[int] = field(default_factory=list)
    width: int = 0
    height: int = 0


def split_picture(events: Sequence[Event], colours: Mapping[str, str]) -> str:
    """Draws the latest plan: a row per device with its ends, between them the hosts on its way.

    Rows that are next to each other share the box of a host.
    """
    plans = [plan for plan in of_kind(events, PlanMade) if plan.routes]
    if not plans:
        return "<p>No plan was made.</p>"
    if not any(route.num_layers for route in plans[-1].routes):
        return "<p>The model is a network without layers to cut: each device has all of it.</p>"
    routes = sorted(plans[-1].routes, key=lambda route: (_chain(route), by_name(route.device)))
    with_head = labels_leave(events)
    boxes = [*_ends(routes, with_head), *_slices(routes, with_head)]
    grid = _grid(routes, boxes)
    ways = [_arrows(grid, row, cut) for row, route in enumerate(routes) for cut in _cuts(route, with_head)]
    drawn = "".join([*ways, *(_draw(box, grid, colours) for box in boxes)])
    size_and_role = f'width="{grid.width + 4}" viewBox="-2 -2 {grid.width + 4} {grid.height + 4}" role="img"'
    return f'<svg {size_and_role} aria-label="which layers stand where">{drawn}</svg>'


def labels_leave(events: Iterable[Event]) -> bool:
    """Returns whether the last host holds the head and sees the labels."""
    return _WITH_HEAD.get(str(setting(events, "split", "labels")), False)


def _chain(route: RoutePicture) -> list[list[tuple[int, str]]]:
    return [by_name(hop.node) for hop in route.hops]


def _cuts(route: RoutePicture, with_head: bool) -> list[int]:
    """Returns the layers at which the route changes its node; `with_head`: the last host holds the head."""
    return [*(hop.first for hop in route.hops), *(hop.last for hop in route.hops[-1:] if not with_head)]


def _ends(routes: Sequence[RoutePicture], with_head: bool) -> Iterator[LayerBox]:
    """Yields the boxes of the layers that devices keep: the whole model if a route has no host."""
    for row, route in enumerate(routes):
        name, layers = route.device, route.num_layers
        if not route.hops:
            text = f"the whole model, {human_layers((0, layers))}"
            yield LayerBox(name, row, [(EMBEDDING, layers + 1)], text, own=True)
            continue
        front, back = _and_layers(0, route.front), _and_layers(route.back_first, layers)
        yield LayerBox(name, row, [(EMBEDDING, route.front)], f"embedding{front}", own=True)
        if not with_head:
            yield LayerBox(name, row, [(route.back_first, layers + 1)], f"head, loss{back}", own=True)


def _slices(routes: Sequence[RoutePicture], with_head: bool) -> list[LayerBox]:
    """Returns the boxes of the hosts; rows next to each other that cross the same slice share a box."""
    boxes: list[LayerBox] = []
    for row, route in enumerate(routes):
        for hop in route.hops:
            above = next((box for box in boxes if box.meets(hop.node, row, hop.first, hop.last)), None)
            if above is None:
                boxes.append(LayerBox(hop.node, row, [(hop.first, hop.last)]))
            else:
                above.spans.append((hop.first, hop.last))
    for box in boxes:
        firsts, lasts = zip(*box.spans, strict=True)
        head = ", head, loss" if with_head and max(lasts) == routes[box.row].num_layers else ""
        box.text = f"{human_layers((min(firsts), max(lasts)))}{head}"
    return boxes


def _and_layers(first: int, last: int) -> str:
    return f", {human_layers((first, last))}" if last > first else ""


def _grid(routes: Sequence[RoutePicture], boxes: Sequence[LayerBox]) -> PictureGrid:
    layers = max(route.num_layers for route in routes)
    edges = sorted({edge for box in boxes for span in box.spans for edge in span})
    columns = list(pairwise(edges))
    widths = [max(COLUMN_WIDTH, LAYERS_WIDTH * (last - first) // layers) for first, last in columns]
    for box in boxes:
        for span in box.spans:
            held = [i for i, (first, last) in enumerate(columns) if span[0] <= first and last <= span[1]]
            missing = (
                (BOX_WIDTH if len(box.text) < TEXT_SHORT else END_WIDTH)
                - sum(widths[i] for i in held)
                - GAP_X * (len(held) - 1)
            )
            widths[held[0] if span[0] == EMBEDDING else held[-1]] += max(0, missing)
    grid, x, y = PictureGrid(), 0, 0
    for (first, last), width in zip(columns, widths, strict=True):
        grid.left[first], grid.right[last] = x, x + width
        x += width + GAP_X
    for row, route in enumerate(routes):
        y += SITE_GAP if row and _chain(route) != _chain(routes[row - 1]) else 0
        grid.top.append(y)
        y += ROW_HEIGHT + GAP_Y
    grid.width, grid.height = x - GAP_X, y - GAP_Y
    return grid


def _draw(box: LayerBox, grid: PictureGrid, colours: Mapping[str, str]) -> str:
    """Draws a box with its name and layers; a staircase if its routes enter or leave at different layers."""
    sides = [(grid.left[first], grid.right[last]) for first, last in box.spans]
    tops = grid.top[box.row : box.row + len(box.spans)]
    top, bottom = tops[0], tops[-1] + ROW_HEIGHT
    halves = sides[(len(sides) - 1) // 2 : len(sides) // 2 + 1]  # of the rows in the middle
    x, middle = max(left for left, _ in halves) + 12, (top + bottom) // 2
    colour = colours.get(box.node, "--muted")
    room = (min(right for _, right in halves) - x - 4) // 8
    name = box.node if len(box.node) <= room else f"{box.node[: room - 1]}…"
    return (
        f'<g class="{"own" if box.own else "host"}" style="color: var({colour})">'
        f"<title>{escape(box.node)}: {escape(box.text)}</title>"
        f"{_outline(sides, tops)}"
        f'<text class="name" x="{x}" y="{middle - 4}">{escape(name)}</text>'
        f'<text class="small" x="{x}" y="{middle + 14}">{escape(box.text)}</text></g>'
    )


def _outline(sides: Sequence[tuple[int, int]], tops: Sequence[int]) -> str:
    """Draws the outline of rows below each other, each with its own left and right side."""
    (left, right), height = sides[0], tops[-1] + ROW_HEIGHT - tops[0]
    if len(set(sides)) == 1:
        return f'<rect class="box" x="{left}" y="{tops[0]}" width="{right - left}" height="{height}" rx="6"/>'
    steps = [top - GAP_Y // 2 for top in tops[1:]]
    down = "".join(f"V{y}H{right}" for y, (_, right) in zip(steps, sides[1:], strict=True))
    up = "".join(f"V{y}H{left}" for y, (left, _) in reversed(list(zip(steps, sides[:-1], strict=True))))
    return f'<path class="box" d="M{left} {tops[0]}H{right}{down}v{tops[0] + height - steps[-1]}H{sides[-1][0]}{up}Z"/>'


def _arrows(grid: PictureGrid, row: int, cut: int) -> str:
    """Draws the arrows at a cut: activations there, gradients back."""
    left, right = grid.right[cut] + 4, grid.left[cut] - 4
    there = grid.top[row] + ROW_HEIGHT // 2 - 6
    back = there + 12
    return (
        f'<path class="way" d="M{left} {there}H{right}m-6 -4l6 4l-6 4M{left + 6} {back - 4}l-6 4l6 4"/>'
        f'<path class="way back" d="M{right} {back}H{left}"/>'
    )
