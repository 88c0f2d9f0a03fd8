"""What a run came to, made from its events alone: the content of RUN/summary.json, and a table of it.

Knows nothing about files or about how a run goes on; `events.py` lists the events, `report.py` draws the same values.
A value that no event gives is null. Fields of summary.json:

    run             name of the run
    state           "done" (run_done was seen), "failed" (run_failed), else "running"
    model           model.name of the run file
    task            task.kind of the run file
    rounds          training rounds that were closed; the evaluation after the last one is none
    seconds         wall clock from run_started to run_done or run_failed, or to the last event so far
    virtual         with [wireless] {seconds, bytes, joules}: of all training rounds, in virtual time; else null
    versions        {package: version} on the server
    devices[]       one a device, by name
        name
        examples            examples that it trains on
        perplexity_before   held-out, of the adapter that round 1 started from; null for a device that came later
        perplexity_after    held-out, at the last round_done (the evaluation after the last round, where the run ended);
                            null for a device that was not in it, and while there is only one
        metrics_before      {metric: value} beside perplexity, as "accuracy"; at the same time, {} where there is none
        metrics_after
        tokens_per_s        tokens trained / seconds of training, both summed over rounds, waiting for others included
        bytes_up            sent on its links, all kinds of frames, over all rounds and the last evaluation
        bytes_down          received on its links
        adapter_bytes_up    adapters that it sent to the server, through Flower
        adapter_bytes_down  adapters that it received from there
        peak_rss_bytes      largest resident memory of its stage host's process
    hosts[]         one a node that serves devices, by name; one that is a device too stands in both
        name
        layers              [first, last): its slice, 0-based, `last` excluded; of the latest round
        peak_rss_bytes, bytes_up, bytes_down    as above
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

Event = Mapping[str, Any]
LINK_BYTES = ("bytes_up", "bytes_down")
ADAPTER_BYTES = ("adapter_bytes_up", "adapter_bytes_down")
NOTHING = "-"


def build_summary(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of summary.json; its writer hands over run_done with the events, else `state` is "running"."""
    started = next(of_kind(events, "run_started"), {})
    return {
        "run": started.get("run"),
        "state": run_state(events),
        "model": setting(started, "model", "name"),
        "task": task_of(events),
        "devices": _devices(events),
        "hosts": _hosts(events),
        "rounds": sum(map(is_training_round, of_kind(events, "round_done"))),
        "seconds": _seconds(events),
        "virtual": _virtual(events),
        "versions": started.get("versions") or {},
    }


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The devices, and below them the hosts, in units for people; fits into 80 columns."""
    title = f"{escape(str(summary.get('run') or 'run'))}: {_what_happened(summary)}\n"
    measure = measure_of(summary.get("task"))
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("node", overflow="fold")  # a long name takes two lines rather than room from the numbers
    for heading in ("examples\nor layers", f"held-out\n{measure}", "tokens/s", "sent", "received", "peak\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for device in summary.get("devices") or []:
        holds, speed = human_number(device.get("examples")), human_number(device.get("tokens_per_s"), 1)
        table.add_row(_name(device), holds, _change(device, measure), speed, *_bytes_and_memory(device))
    table.add_section()
    for host in summary.get("hosts") or []:
        table.add_row(_name(host), _span(host), "", "", *_bytes_and_memory(host))
    return table


def task_of(events: Iterable[Event]) -> str | None:
    """task.kind of the run file."""
    return setting(next(of_kind(events, "run_started"), {}), "task", "kind")


def measure_of(task: str | None) -> str:
    """What says best how good an adapter is at the task: "accuracy" or "perplexity"."""
    return "accuracy" if task == "classification" else "perplexity"


def measured(record: Event, measure: str, when: str = "") -> float | None:
    """The measure in a device's record of round_done, or (`when`: "_before", "_after") of a summary."""
    direct = record.get(f"{measure}{when}")
    return (record.get(f"metrics{when}") or {}).get(measure) if direct is None else direct


def human_measure(measure: str, value: float | None) -> str:
    """Perplexity 15.501 -> "15.50", accuracy 0.8125 -> "81.2 %"."""
    if value is None:
        return NOTHING
    return f"{value:.1%}".replace("%", " %") if measure == "accuracy" else human_number(value, 2)


def run_state(events: Iterable[Event]) -> str:
    """One of "done", "failed", "running"."""
    kinds = {event.get("event") for event in events}
    return "failed" if "run_failed" in kinds else "done" if "run_done" in kinds else "running"


def is_training_round(round_done: Event) -> bool:
    """Whether a device took a step in it: false for the evaluation after the last round."""
    return any(
        device.get("step_losses") or device.get("loss") is not None for device in round_done.get("devices") or []
    )


def of_kind(events: Iterable[Event], kind: str) -> Iterator[Event]:
    """The events of one kind, in their order."""
    return (event for event in events if event.get("event") == kind)


def setting(started: Event, section: str, key: str) -> Any:
    """A key of the run file, from run_started."""
    config = started.get("config")
    return (config.get(section) or {}).get(key) if isinstance(config, Mapping) else None


def by_name(name: Any) -> list[tuple[int, str]]:
    """Sort key that puts device-10 after device-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(name))]


def total(values: Iterable[float | None]) -> Any:
    """The sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def human_bytes(count: float | None) -> str:
    """1234567 -> "1.23 MB": three digits, decimal units."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    decimals = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:.{decimals}f} {unit}"


def human_seconds(seconds: float | None) -> str:
    """7.25 -> "7.2 s", 83 -> "1 min 23 s", 3725 -> "1 h 02 min"."""
    if seconds is None:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def human_number(value: float | None, decimals: int = 0) -> str:
    """With a comma between thousands; a dash for None."""
    return NOTHING if value is None else f"{value:,.{decimals}f}"


def human_layers(layers: Any) -> str:
    """[2, 28] -> "layers 2-27", [2, 3] -> "layer 2"."""
    if not layers:
        return "no layers yet"
    first, last = layers[0], layers[1] - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _name(node: Event) -> str:
    return escape(str(node.get("name")))


def _change(device: Event, measure: str) -> str:
    before, after = (measured(device, measure, when) for when in ("_before", "_after"))
    text = f"{human_measure(measure, before)} -> {human_measure(measure, after)}"
    return text if after is None else text.replace(" % ->", " ->")  # one unit for both


def _span(host: Event) -> str:
    return human_layers(host.get("layers")).removeprefix("layers ")


def _bytes_and_memory(node: Event) -> list[str]:
    return [human_bytes(node.get(key)) for key in (*LINK_BYTES, "peak_rss_bytes")]


def _what_happened(summary: Mapping[str, Any]) -> str:
    rounds = summary.get("rounds") or 0
    number = "1 round" if rounds == 1 else f"{rounds} rounds"
    return f"{summary.get('state')}, {number} in {human_seconds(summary.get('seconds'))}"


def _seconds(events: list[dict[str, Any]]) -> float | None:
    """run_done's own measure; otherwise the time between the events."""
    done = next(of_kind(events, "run_done"), {})
    if done.get("seconds") is not None or not events:
        return done.get("seconds")
    end = next(of_kind(events, "run_failed"), events[-1])
    return round(end.get("time", 0.0) - events[0].get("time", 0.0), 3)


def _virtual(events: list[dict[str, Any]]) -> dict[str, float] | None:
    rounds = [event["virtual"] for event in of_kind(events, "round_done") if event.get("virtual")]
    return {key: sum(r[key] for r in rounds) for key in ("seconds", "bytes", "joules")} if rounds else None


def _devices(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rounds = list(of_kind(events, "round_done"))
    joined = {e["node"]: e.get("examples") for e in of_kind(events, "node_joined") if e.get("role") == "device"}
    records = _records(rounds, "devices")
    before = _records(rounds[:1], "devices")
    after = _records(rounds[-1:], "devices") if len(rounds) > 1 else {}
    devices = []
    for name in sorted({*joined, *records}, key=by_name):
        own = records.get(name, [])
        tokens, seconds = (total(record.get(key) for record in own) for key in ("tokens", "train_seconds"))
        devices.append(
            {
                "name": name,
                "examples": next((r["examples"] for r in own if r.get("examples") is not None), joined.get(name)),
                **_quality(before.get(name), "_before"),
                **_quality(after.get(name), "_after"),
                "tokens_per_s": round(tokens / seconds, 3) if tokens is not None and seconds else None,
                **{key: total(record.get(key) for record in own) for key in LINK_BYTES + ADAPTER_BYTES},
                "peak_rss_bytes": _peak(own),
            }
        )
    return devices


def _hosts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that a plan named or a round reports."""
    records = _records(of_kind(events, "round_done"), "hosts")
    layers: dict[str, Any] = {}
    for plan in of_kind(events, "plan"):
        layers |= _slices(plan)
    layers |= {name: own[-1].get("layers") for name, own in records.items()}
    return [
        {
            "name": name,
            "layers": layers[name],
            "peak_rss_bytes": _peak(records.get(name, [])),
            **{key: total(record.get(key) for record in records.get(name, [])) for key in LINK_BYTES},
        }
        for name in sorted(layers, key=by_name)
    ]


def _slices(plan: Event) -> dict[str, list[int]]:
    """{host: [first, last)}: what the routes of a plan need of it; each may cross less."""
    slices: dict[str, list[int]] = {}
    for hop in (hop for route in plan.get("routes") or [] for hop in route.get("hops") or []):
        first, last = slices.get(hop["node"], (hop["first"], hop["last"]))
        slices[hop["node"]] = [min(first, hop["first"]), max(last, hop["last"])]
    return slices


def _records(rounds: Iterable[Event], role: str) -> dict[str, list[Event]]:
    """{name: its records, a round each}."""
    records: dict[str, list[Event]] = {}
    for round_done in rounds:
        for record in round_done.get(role) or []:
            records.setdefault(record["name"], []).append(record)
    return records


def _quality(records: list[Event] | None, when: str) -> dict[str, Any]:
    """Of at most one record."""
    record = records[0] if records else {}
    return {f"perplexity{when}": record.get("perplexity"), f"metrics{when}": record.get("metrics") or {}}


def _peak(records: Iterable[Event]) -> int | None:
    return max((r["peak_rss_bytes"] for r in records if r.get("peak_rss_bytes") is not None), default=None)
