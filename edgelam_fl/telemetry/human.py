"""Numbers and names as people read them. Knows no event."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "-"


def by_name(name: Any) -> list[tuple[int, str]]:
    """Returns a sort key that puts device-10 after device-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(name))]


def total(values: Iterable[float | None]) -> Any:
    """Adds the values that are known; returns None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def human_bytes(count: float | None) -> str:
    """Writes 1234567 as "1.23 MB": three digits, decimal units; a dash for None."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    decimals = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{decimals}f} {unit}"


def human_seconds(seconds: float | None) -> str:
    """Writes 7.25 as "7.2 s", 83 as "1 min 23 s", 3725 as "1 h 02 min"; a dash for None."""
    if seconds is None:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def human_moment(unix_s: float) -> str:
    """Writes Unix seconds as "2026-11-29 15:28", by this machine's clock and time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def human_number(value: float | None, decimals: int = 0) -> str:
    """Writes a number with a comma between thousands; a dash for None."""
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def human_count(count: int, noun: str, plural: str = "") -> str:
    """Writes 1 and "device" as "1 device", 2 as "2 devices"; `plural`: of a noun that does not just take an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def human_layers(layers: Sequence[int] | None) -> str:
    """Writes [2, 28] as "layers 2-27", [2, 3] as "layer 2"."""
    if not layers:
        return "no layers yet"
    first, last = layers[0], layers[1] - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"
