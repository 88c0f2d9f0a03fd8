"""The split as an SVG: which layers stand where. A part of the report's page, whose CSS gives it its colours."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby, pairwise
from typing import Any

from edgelam_fl.telemetry.summary import by_name, human_layers, of_kind

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y, TOP = 200, 50, 100, 16, 34  # pixels


def split_picture(events: list[dict[str, Any]], colours: Mapping[str, str]) -> str:
    """The latest plan, a row a device: its front, the hosts on its way, its back; neighbours share a host's box."""
    plans = [plan for plan in of_kind(events, "plan") if plan.get("routes")]
    if not plans:
        return "<p>No plan is made yet.</p>"
    routes = sorted(plans[-1]["routes"], key=lambda route: by_name(route["device"]))
    hops = [[(hop["node"], hop["first"], hop["last"]) for hop in route.get("hops") or []] for route in routes]
    last = max(map(len, hops)) + 1
    shapes = [_zone(column, len(routes)) for column in (0, last)]
    for row, route in enumerate(routes):
        name, colour = route["device"], colours.get(route["device"], "--muted")
        front, back = _and_layers(0, route["front"]), _and_layers(route["back_first"], route["num_layers"])
        shapes += [_arrows(row, *stretch) for stretch in pairwise([0, *range(1, len(hops[row]) + 1), last])]
        shapes.append(_box(0, row, 1, name, f"embedding{front}", colour))
        shapes.append(_box(last, row, 1, name, f"head, loss{back}", colour))
    for column in range(1, last):
        row = 0
        for hop, group in groupby(own[column - 1] if column <= len(own) else None for own in hops):
            size = len(list(group))
            shapes += [_box(column, row, size, hop[0], human_layers(hop[1:]))] if hop else []
            row += size
    width, height = (last + 1) * (BOX_WIDTH + GAP_X) - GAP_X + 24, TOP + len(routes) * (BOX_HEIGHT + GAP_Y)
    size_and_role = f'width="{width}" viewBox="-12 0 {width} {height}" role="img" aria-label="which layers stand where"'
    return f"<svg {size_and_role}>{''.join(shapes)}</svg>"


def _and_layers(first: int, last: int) -> str:
    return f", {human_layers((first, last))}" if last > first else ""


def _zone(column: int, rows: int) -> str:
    """What the devices keep to themselves, framed."""
    x, height = column * (BOX_WIDTH + GAP_X), TOP + rows * (BOX_HEIGHT + GAP_Y) - 2
    frame = f'<rect class="zone" x="{x - 10}" y="1" width="{BOX_WIDTH + 20}" height="{height}" rx="10"/>'
    return f'{frame}<text class="small" x="{x}" y="21">text and labels stay here</text>'


def _box(column: int, row: int, rows: int, name: str, text: str, colour: str = "--muted") -> str:
    x, y = column * (BOX_WIDTH + GAP_X), TOP + row * (BOX_HEIGHT + GAP_Y)
    height = rows * (BOX_HEIGHT + GAP_Y) - GAP_Y
    middle, short = y + height / 2, name if len(name) <= 20 else f"{name[:19]}…"
    place = f'x="{x}" y="{y}" width="{BOX_WIDTH}" height="{height}" rx="6"'
    shape = f'<rect class="box" style="stroke: var({colour})" {place}/>'
    title = f'<text class="name" x="{x + 12}" y="{middle - 4}">{escape(short)}</text>'
    below = f'<text class="small" x="{x + 12}" y="{middle + 14}">{escape(text)}</text>'
    return f"<g><title>{escape(name)}</title>{shape}{title}{below}</g>"


def _arrows(row: int, start: int, end: int) -> str:
    """Activations there, gradients back."""
    left, right = start * (BOX_WIDTH + GAP_X) + BOX_WIDTH + 3, end * (BOX_WIDTH + GAP_X) - 3
    there = TOP + row * (BOX_HEIGHT + GAP_Y) + BOX_HEIGHT // 2 - 6
    back = there + 12
    return (
        f'<path class="way" d="M{left} {there}H{right}m-6 -4l6 4l-6 4M{left + 6} {back - 4}l-6 4l6 4"/>'
        f'<path class="way back" d="M{right} {back}H{left}"/>'
    )
