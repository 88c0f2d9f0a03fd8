"""Runs side by side: what they reached, what it cost, and the settings in which they differ. Knows run folders; knows no looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgelam_fl.errors import ConfigError, UsageError
from edgelam_fl.telemetry.events import EVENTS_FILE, Event, RoundDone, RunStarted, of_kind, read_events
from edgelam_fl.telemetry.human import NOTHING, by_name, human_bytes, human_number, human_seconds, total
from edgelam_fl.telemetry.measures import human_measure, measure_of
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.run_folder import state_now
from edgelam_fl.telemetry.summary import (
    ADAPTER_BYTES,
    LINK_BYTES,
    Summary,
    before_and_after,
    build_summary,
    finished_rounds,
    steps_of,
)
from edgelam_fl.telemetry.verdict import before_after, spread_of, with_spread

MOST_RUNS = 8
_OF_A_PLACE = ("run.out",)  # keys that say where a run is, not what it does


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs, as far as a comparison needs it."""

    name: str
    """Its folder's name, or its whole path if two folders have the same name."""
    folder: Path
    summary: Summary
    rounds: Sequence[RoundDone]
    config: Mapping[str, Any]
    """The run file by sections; empty if the run never began."""

    @property
    def measure(self) -> str:
        """The name of its held-out measure."""
        return measure_of(self.summary.task)


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Reads the folders of two runs or more. Raises UsageError for one that is no run's, ConfigError for too few or too many."""
    places = [folder.absolute() for folder in folders]
    if not 2 <= len(set(places)) == len(places) <= MOST_RUNS:
        raise ConfigError(f"`edgelam compare` takes 2 to {MOST_RUNS} different run folders; got {len(set(places))}")
    names = [place.name for place in places]
    named = [
        str(folder) if names.count(place.name) > 1 else place.name
        for folder, place in zip(folders, places, strict=True)
    ]
    return [_read(name, place) for name, place in zip(named, places, strict=True)]


def _read(name: str, folder: Path) -> ComparedRun:
    if not (folder / EVENTS_FILE).is_file():
        raise UsageError(f"{folder} is not a run's folder: it has no {EVENTS_FILE}")
    events: list[Event] = list(read_events(folder / EVENTS_FILE))
    config = next((started.config for started in of_kind(events, RunStarted)), {})
    summary = build_summary(events, state_now(folder, events))
    return ComparedRun(name, folder, summary, finished_rounds(events), config)


# ---------------------------------------------------------------- what they have in common and what not


def facts(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Returns rows of what the runs reached and what it cost: a word for what it is, and a text per run."""

    def each(of: Callable[[Summary], str]) -> list[str]:
        return [of(run.summary) for run in runs]

    def bytes_of(keys: Iterable[str]) -> list[str]:
        return each(lambda s: human_bytes(total(getattr(device, key) for device in s.devices for key in keys)))

    rows = [
        ("state", each(lambda s: s.state)),
        ("model", each(lambda s: s.model or NOTHING)),
        *(row for measure in dict.fromkeys(run.measure for run in runs) for row in _held_out(runs, measure)),
        ("devices", each(lambda s: human_number(len(s.devices)))),
        ("hosts", each(lambda s: human_number(len(s.hosts)))),
        ("rounds", each(lambda s: human_number(s.rounds))),
        ("optimizer steps", [human_number(sum(map(steps_of, run.rounds))) for run in runs]),
        ("time", each(lambda s: human_seconds(s.seconds))),
        ("tokens/s per device", [_speed(run) for run in runs]),
        ("over links", bytes_of(LINK_BYTES)),
        ("adapters via Flower", bytes_of(ADAPTER_BYTES)),
        (
            "peak memory of a device",
            each(lambda s: human_bytes(max((d.peak_rss_bytes or 0 for d in s.devices), default=0) or None)),
        ),
        ("epsilon spent", each(lambda s: f"{s.privacy.epsilon:.4g}" if s.privacy else NOTHING)),
    ]
    return [(what, values) for what, values in rows if set(values) != {NOTHING}]


def _held_out(runs: Sequence[ComparedRun], measure: str) -> list[tuple[str, list[str]]]:
    found = [before_after(run.summary) if run.measure == measure else (None, None) for run in runs]
    return [
        (f"held-out {measure} {when}", [with_spread(measure, pair[at]) for pair in found])
        for at, when in ((0, "before"), (1, "after"))
    ]


def _speed(run: ComparedRun) -> str:
    found = spread_of(device.tokens_per_s for device in run.summary.devices)
    return human_number(found.mean, 1) if found else NOTHING


def devices_after(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Returns each device's held-out value at the end of each run, by the device's name."""
    found = [
        {d.name: human_measure(run.measure, before_and_after(d, run.measure)[1]) for d in run.summary.devices}
        for run in runs
    ]
    names = sorted({name for values in found for name in values}, key=by_name)
    return [(name, [values.get(name, NOTHING) for values in found]) for name in names]


def unlike_settings(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """Returns the keys of the run file that differ, with their values as JSON; a dash for a run that does not say."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in _OF_A_PLACE)
    rows = [(key, [values.get(key, NOTHING) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(config: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, name)
        else:
            yield name, json.dumps(value, ensure_ascii=False)


def caution(runs: Sequence[ComparedRun]) -> str:
    """Says why the runs' measures cannot be compared number by number; "" if nothing speaks against it."""
    if len({run.measure for run in runs}) > 1:
        return "The runs have different tasks: their held-out measures are not the same."
    unlike = {key for key, _ in unlike_settings(runs)}
    if any(run.measure == "perplexity" for run in runs) and len({run.summary.model for run in runs}) > 1:
        return "The runs have different models: a perplexity depends on the tokenizer, so do not compare them with each other."
    measured = sorted(unlike & {"data.held_out", "federation.evaluate_examples", "task.max_tokens", "task.template"})
    if measured:
        return f"The runs differ in {', '.join(measured)}: they are not measured on the same texts."
    names = [{device.name for device in run.summary.devices} for run in runs]
    if any(other != names[0] for other in names):
        return "The runs have different devices: their means are over different data."
    return ""


# ---------------------------------------------------------------- for people and machines


def comparison_table(runs: Sequence[ComparedRun]) -> Table:
    """Draws the runs as columns: what they reached and cost, each device at the end, and settings that differ."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for run in runs:
        table.add_column(escape(run.name), justify="right", overflow="fold")
    unlike = unlike_settings(runs)
    for rows in (facts(runs), devices_after(runs), unlike):
        for what, values in rows:
            table.add_row(escape(what), *map(escape, values))
        table.add_section()
    return table


def comparison_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Returns the comparison as JSON holds it: numbers as they are, means and spreads over devices, settings as they are typed."""
    found = []
    for run in runs:
        before, after = before_after(run.summary)
        found.append({
            "name": run.name, "folder": str(run.folder), "measure": run.measure, "before": as_json(before), "after": as_json(after),
            "steps": sum(map(steps_of, run.rounds)), "summary": as_json(run.summary),
        })  # fmt: skip
    settings = {
        key: [None if value == NOTHING else json.loads(value) for value in values]
        for key, values in unlike_settings(runs)
    }
    return {"runs": found, "caution": caution(runs), "settings": settings}
