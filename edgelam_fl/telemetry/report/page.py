"""RUN/report.html: one page without network access that shows a run, also a run in progress or one that failed.

Reads the run's folder and nothing else: events.jsonl, summary.json if the run has written it (its values are shown then),
answers.json and over_time.json. Texts of events are escaped. `page.html` holds the order of the parts, `frame.py` what all pages have in common,
`figures.py` the curves and bars, `split_picture.py` the layers per node, `incidents.py` the failures.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import repeat
from pathlib import Path
from typing import Any

from edgelam_fl.errors import UsageError
from edgelam_fl.files import from_home, write_atomically
from edgelam_fl.telemetry.events import (
    EVENTS_FILE,
    TIMELINES_FILE,
    Event,
    RoundTimeline,
    RunStarted,
    TextReadable,
    of_kind,
    read_events,
)
from edgelam_fl.telemetry.human import (
    human_bytes,
    human_layers,
    human_number,
    human_seconds,
    total,
)
from edgelam_fl.telemetry.measures import MEASURES, human_measure, measure_of
from edgelam_fl.telemetry.report.answers import Answer, read_answers
from edgelam_fl.telemetry.report.figures import (
    LINES_SHOWN,
    NOISE_SHOWN,
    cost_figures,
    learning_figures,
    over_time_figure,
    timeline_figures,
    window_of,
)
from edgelam_fl.telemetry.report.frame import COLOURS, as_script, exact, figure, filled, framed, part, table
from edgelam_fl.telemetry.report.incidents import failure, incidents
from edgelam_fl.telemetry.report.over_time import OverTime, read_over_time
from edgelam_fl.telemetry.report.split_picture import labels_leave, split_picture
from edgelam_fl.telemetry.run_folder import state_now
from edgelam_fl.telemetry.summary import (
    ADAPTER_BYTES,
    LINK_BYTES,
    DeviceSummary,
    HostSummary,
    PrivacySummary,
    Summary,
    before_and_after,
    build_summary,
    finished_rounds,
    read_summary,
    steps_of,
)
from edgelam_fl.telemetry.summary_words import channel_in_words, clipped_in_words
from edgelam_fl.telemetry.timeline import Phase, read_phase
from edgelam_fl.telemetry.verdict import OVER, before_after, verdict, with_spread

INCIDENTS_SHOWN = 200
NO_ROUND = ("No round was closed, so there are no figures.", "No round is closed yet.")
DEVICE_HEADINGS = (
    "device|{measure} after|before|examples|tokens/s|sent|received|adapters sent|adapters received|peak memory"
)
DATA_HEADINGS = "device|learned|measured|not measured|cut|too long|unreadable|unused fields"


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html (2 MB at most) in one move and returns its path.

    Raises UsageError if the folder holds no events.
    """
    source, written = run_dir / EVENTS_FILE, run_dir / "summary.json"
    if not source.is_file():
        raise UsageError(f"{run_dir} is not a run's folder: it holds no {EVENTS_FILE}")
    events = list(read_events(source))
    state = state_now(run_dir, events)
    kept = [run_dir / f"{TIMELINES_FILE}.old", run_dir / TIMELINES_FILE]
    timelines = [event for file in kept if file.is_file() for event in read_events(file)]
    summary = (
        read_summary(written)
        if written.is_file() and state == "done"
        else build_summary(events, state, run_dir.absolute().name)
    )
    page = run_dir / "report.html"
    found = read_answers(run_dir), read_over_time(run_dir)
    write_atomically(page, report_page([*events, *timelines], summary, run_dir, *found))
    return page


def report_page(
    events: Sequence[Event],
    summary: Summary,
    folder: Path,
    answers: Sequence[Answer] = (),
    shown: OverTime | None = None,
) -> str:
    """Returns the page's text. folder: the run's, for the commands that use its result. shown: a channel over time, if there is one."""
    config = next((started.config for started in of_kind(events, RunStarted)), {})
    rounds = finished_rounds(events)
    phases = [phase for phase in map(read_phase, of_kind(events, RoundTimeline)) if phase]
    colours = {device.name: f"--c{i % COLOURS}" for i, device in enumerate(summary.devices)}
    measure = measure_of(summary.task)
    timelines = timeline_figures(phases, colours)
    parts = {
        "name": escape(str(summary.run or "unnamed run")),
        "state": escape(summary.state),
        "state_class": summary.state.replace(" ", "-"),
        "subtitle": escape(_subtitle(summary)),
        "failure": _banner(failure(events)),
        "verdict": escape(verdict(summary)),
        "tiles": "".join(f'<div class="card muted">{what}<b>{value}</b></div>' for what, value in _tiles(summary)),
        "devices": _device_table(summary, colours, measure) + _data_table(summary.devices, colours),
        "hosts": _host_table(summary.hosts, colours),
        "no_round": "" if rounds else f'<p class="card muted">{NO_ROUND[summary.state not in OVER]}</p>',
        "hide_figures": "" if rounds else "hidden",
        "learning": _learning_places(measure, len(summary.devices), sum(map(steps_of, rounds)), shown)
        if rounds
        else "",
        "costs": _cost_places() if rounds else "",
        "answers": _answers(answers),
        "next": escape(commands(summary, folder)),
        "hide_timeline": "" if timelines else "hidden",
        "choices": "".join(
            f"<option value={i}>round {escape(str(each['round']))}</option>" for i, each in enumerate(timelines)
        ),
        "shares": "".join(map(_share_table, phases[len(phases) - len(timelines) :], repeat(colours))),
        "stays": "the bytes of its text stay; labels go to the last host"
        if labels_leave(events)
        else "the bytes of its text and labels stay",
        "readable": escape(_readable(events)),
        "split": split_picture(events, colours),
        "privacy": _privacy_table(summary.privacy),
        "incidents": _incident_table(events),
        "settings": table("", "key|value", _settings(config), "words"),
        "timelines": as_script(timelines),
    }
    figures = learning_figures(rounds, colours, measure) | cost_figures(rounds)
    if shown is not None:
        figures["over_time"] = over_time_figure(shown)
    return framed(parts["name"], filled(part("page.html"), parts), figures, [part("timeline.js")] if timelines else [])


def _learning_places(measure: str, devices: int, steps: int, shown: OverTime | None) -> str:
    better = "higher" if MEASURES[measure].higher else "lower"
    band = " Bold: the mean over devices; the band is their spread (one standard deviation)." if devices > 1 else ""
    alone = f" Of {devices} devices, the mean alone is drawn." if devices > LINES_SHOWN else ""
    window = window_of(steps)
    smooth = f"Each point is the mean of {window} steps" if window > 1 else "One point per step"
    faint = "; faint: each step" if window > 1 and devices <= NOISE_SHOWN else ""
    held_out = f"Examples that a device never learns from; {better} is better.{band}{alone}"
    over = MEASURES[measure].over.partition(",")[0]
    compared = f"Held-out examples of all devices, the same for all; {better} is better."
    return (
        figure("quality", f"Held-out {measure}", held_out)
        + figure("loss", "Training loss", f"{smooth}{faint}. Dotted: an aggregation.")
        + (figure("points", f"Held-out {measure} by {over}", compared) if over else "")
        + (_over_time_place(shown) if shown is not None else "")
    )


def _over_time_place(shown: OverTime) -> str:
    said = f"The strongest series of one held-out link, of a user at {shown.speed_kmh:.0f} km/h. Dotted: where the prediction begins."
    return figure("over_time", "Predicted against true channel", said)


def _cost_places() -> str:
    traffic = figure("bytes", "Traffic per round", "All devices, both directions; adapters travel through Flower.")
    return traffic + figure(
        "seconds",
        "Time per round",
        "Training and evaluation of the slowest device; the rest is Flower and waiting.",
    )


def commands(summary: Summary, folder: Path) -> str:
    """Returns the commands that use a run's result or, if it did not end well, go on with it: one per line."""
    place = _typed(from_home(str(folder.absolute())))
    if summary.state not in OVER:
        return f"edgelam top {place}\nedgelam report {place}"
    forms = (
        ("peft",) if MEASURES[measure_of(summary.task)].over else ("merged", "peft")
    )  # a radio task's model is no text's
    use = [f"edgelam export {place} --to {form}" for form in forms]
    if summary.task == "causal-lm":
        use.insert(0, f"edgelam chat {place}")
    if summary.state != "done":
        use = [f"edgelam run --resume {place}", *(use if summary.rounds else [])]
    return "\n".join([*use, f"edgelam compare {place} OTHER_RUN"])


def _typed(place: str) -> str:
    """Returns a path as it is typed: quoted where it has to be, except for the ~ of the home folder."""
    return f"~{shlex.quote(place[1:])}" if place.startswith("~/") else shlex.quote(place)


def _answers(answers: Sequence[Answer]) -> str:
    """Draws the answers to a few questions before and after the run; empty without any."""
    rows = ""
    for answer in answers:
        said = {"before": answer.before, "after": answer.after, "truth": answer.truth}
        texts = "".join(f"<dd><small>{when}</small>{escape(text)}</dd>" for when, text in said.items() if text)
        rows += f"<dt>{escape(answer.question)}</dt>{texts}"
    note = '<p class="muted">Greedy: the most probable word each time. Before: the base model alone.</p>'
    return f'<section class="card answers"><h2>Answers</h2>{note}<dl>{rows}</dl></section>' if rows else ""


def _subtitle(summary: Summary) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in summary.versions.items())
    return " | ".join(filter(None, (summary.model, summary.task, versions)))


def _readable(events: Sequence[Event]) -> str:
    """Says what hosts could read under the newest plan; empty if there were none."""
    found = list(of_kind(events, TextReadable))
    return f"As measured before, {found[-1].words}." if found else ""


def _banner(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{heading}</dt><dd>{escape(text)}</dd>" for heading, text in facts)
    return (
        f'<section class="card banner"><h2 class="failed">The run failed</h2><dl>{rows}</dl></section>' if rows else ""
    )


def _tiles(summary: Summary) -> Iterator[tuple[str, str]]:
    devices = summary.devices
    yield "time", human_seconds(summary.seconds)
    yield "rounds", human_number(summary.rounds)
    yield "devices", human_number(len(devices))
    yield "hosts", human_number(len(summary.hosts))
    yield "over links", human_bytes(total(getattr(device, key) for device in devices for key in LINK_BYTES))
    yield "adapters via Flower", human_bytes(total(getattr(device, key) for device in devices for key in ADAPTER_BYTES))


def _device_table(summary: Summary, colours: Mapping[str, str], measure: str) -> str:
    rows = []
    for device in summary.devices:
        before, after = before_and_after(device, measure)
        held_out = [exact(value, human_measure(measure, value)) for value in (after, before)]
        speed = exact(device.tokens_per_s, human_number(device.tokens_per_s, 1))
        counts = [_exact_bytes(getattr(device, key)) for key in (*LINK_BYTES, *ADAPTER_BYTES, "peak_rss_bytes")]
        rows.append([_node(device.name, colours), *held_out, human_number(device.examples), speed, *counts])
    if len(rows) > 1:
        before_all, after_all = before_after(summary)
        rows.append([
            "<b>mean</b>", with_spread(measure, after_all), with_spread(measure, before_all), *[""] * (len(rows[0]) - 3)
        ])  # fmt: skip
    return table("Devices", DEVICE_HEADINGS.format(measure=measure), rows)


def _data_table(devices: Iterable[DeviceSummary], colours: Mapping[str, str]) -> str:
    """Draws what is not used of the devices' data, or not whole; empty if all is."""
    keys = ("held_out", "unmeasured", "cut", "skipped", "bad", "unread_fields")
    rows = [
        [_node(device.name, colours), *(human_number(getattr(device, key)) for key in ("examples", *keys))]
        for device in devices
        if device.in_words(device.examples or 0, 1 if device.held_out is None else device.held_out)
    ]
    return table("Data not used, or not whole", DATA_HEADINGS, rows, "narrow")


def _host_table(hosts: Iterable[HostSummary], colours: Mapping[str, str]) -> str:
    rows = [
        [_node(host.name, colours), human_layers(host.layers)]
        + [_exact_bytes(getattr(host, key)) for key in (*LINK_BYTES, "peak_rss_bytes")]
        for host in hosts
    ]
    return table("Hosts", "host|holds|sent|received|peak memory", rows, "narrow")


def _share_table(phase: Phase, colours: Mapping[str, str]) -> str:
    """Draws the shares of each node in a round's train phase; the exact seconds are in tooltips."""
    rows = []
    for name, shares in phase.shares().items():
        seconds = (shares.computed_s, shares.sent_s, shares.waited_s)
        cells = [exact(round(s, 4), f"{s / (shares.phase_s or 1):.0%}".replace("%", " %"), " s") for s in seconds]
        rows.append([_node(name, colours), *cells])
    return f"<div hidden>{table('', 'node|computed|sent|waited', rows)}</div>"


def _node(name: str, colours: Mapping[str, str]) -> str:
    """Names a node beside its colour in all figures; hosts have none of their own."""
    return f'<span class="swatch" style="background: var({colours.get(name, "--muted")})"></span>{escape(name)}'


def _privacy_table(privacy: PrivacySummary | None) -> str:
    """Draws what the run promised and spent; empty if it promises nothing."""
    if privacy is None:
        return ""
    early = "; the run ended early, as another round would have spent more" if privacy.ended_early else ""
    rows = {
        "epsilon": f"{privacy.epsilon:.4g} of {privacy.budget:g} spent{early}",
        "delta": f"{privacy.delta:g}",
        "unit": privacy.unit,
        "adversary": privacy.adversary,
        "messages covered": privacy.messages,
        "not covered": privacy.not_covered,
        "noise": f"{privacy.noise:.4g} times the bound (privacy.mode = {privacy.mode!r})",
        "bound": f"an L2 norm of {privacy.clip:.4g}",
        "clipped": f"{clipped_in_words(privacy) or 'not known'}; exact, and so for the server's operator alone",
    }
    if privacy.channel is not None:
        rows["radio channel"] = channel_in_words(privacy.channel)
    drawn = table("Differential privacy", "what|value", [[key, escape(value)] for key, value in rows.items()], "words")
    return f'<section class="card">{drawn}</section>'


def _incident_table(events: Sequence[Event]) -> str:
    """Draws the incidents; empty if there was none."""
    rows = [[escape(words) for words in incident] for incident in incidents(events)]
    drawn = table("Incidents", "after|what|who|why", rows[:INCIDENTS_SHOWN], "words")
    more = f"<p>and {len(rows) - INCIDENTS_SHOWN} more in events.jsonl</p>" if len(rows) > INCIDENTS_SHOWN else ""
    return f'<section class="card">{drawn}{more}</section>' if rows else ""


def _settings(config: Any, path: str = "") -> Iterator[list[str]]:
    """Yields a row per key of the run file, with its path."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield from _settings(value, f"{path}.{key}" if path else str(key))
    else:
        yield [escape(path), escape(json.dumps(config, ensure_ascii=False))]


def _exact_bytes(count: int | None) -> str:
    return exact(count, human_bytes(count), " B")
