"""A run's summary for people: a table of its nodes, and sentences about what it measured, left out and promised.

Knows nothing about where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from edgelam_fl.telemetry.human import (
    human_bytes,
    human_count,
    human_layers,
    human_number,
    human_seconds,
)
from edgelam_fl.telemetry.measures import human_measure, measure_of
from edgelam_fl.telemetry.summary import (
    ChannelSummary,
    DeviceSummary,
    HostSummary,
    PrivacySummary,
    Summary,
    before_and_after,
    mean_metrics,
)

_SAID = 8  # sentences about devices' data below a table


def summary_table(summary: Summary) -> Table:
    """Draws the devices, and below them the hosts, in units for people; fits into 80 columns."""
    title = f"{escape(str(summary.run or 'run'))}: {_what_happened(summary)}\n"
    measure = measure_of(summary.task)
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    said = [
        *(privacy_in_words(summary.privacy) if summary.privacy is not None else []),
        *counts_in_words(summary.devices),
        *metrics_in_words(summary),
        *best_in_words(summary),
    ]
    if said:
        table.caption, table.caption_justify = escape("\n".join(said)), "left"
    table.add_column("node", overflow="fold")  # a long name takes two lines rather than room from the numbers
    for heading in ("examples\nor layers", f"held-out\n{measure}", "tokens/s", "sent", "received", "peak\nmemory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for device in summary.devices:
        holds, speed = human_number(device.examples), human_number(device.tokens_per_s, 1)
        table.add_row(escape(device.name), holds, _change(device, measure), speed, *_bytes_and_memory(device))
    table.add_section()
    for host in summary.hosts:
        span = human_layers(host.layers).removeprefix("layers ")
        table.add_row(escape(host.name), span, "", "", *_bytes_and_memory(host))
    return table


def counts_in_words(devices: Iterable[DeviceSummary]) -> list[str]:
    """Says what is not used of the devices' data: a sentence per line, of the first devices of which there is something to say."""
    said = [
        (device.name, text)
        for device in devices
        if device.examples is not None and device.held_out is not None
        for text in device.in_words(device.examples, device.held_out)
    ]
    more = [f"and {len(said) - _SAID} more; summary.json has the counts of each device"] if len(said) > _SAID else []
    return [f"{name}: {text}" for name, text in said[:_SAID]] + more


def best_in_words(summary: Summary) -> list[str]:
    """Says which adapter is the result, if the run chose it by its loss; one sentence, or none."""
    if summary.best_round is None:
        return []
    made = (
        f"after round {summary.best_round} of {summary.rounds}" if summary.best_round else "that the run started from"
    )
    return [f"result: the adapter {made}, as it had the lowest held-out loss"]


def privacy_in_words(privacy: PrivacySummary) -> list[str]:
    """Says what a run promises and has spent: one sentence per line."""
    clipped = clipped_in_words(privacy)
    return [
        f"privacy: epsilon {privacy.epsilon:.3g} of {privacy.budget:g} spent, at delta {privacy.delta:g}",
        f"protects {privacy.unit}, against {privacy.adversary}",
        f"covers {privacy.messages}, not {privacy.not_covered}",
        f"noise {privacy.noise:.3g} x the bound {privacy.clip:.3g}"
        + (f", which shortened {clipped}" if clipped else ""),
        *([channel_in_words(privacy.channel)] if privacy.channel is not None else []),
    ]


def clipped_in_words(privacy: PrivacySummary) -> str:
    """Says how much the bound shortened; empty if that is not known."""
    shares = {"the updates": privacy.clipped, "the gradients in hosts' steps": privacy.gradients_clipped}
    return " and ".join(f"{100 * share:.0f} % of {what}" for what, share in shares.items() if share is not None)


def channel_in_words(channel: ChannelSummary) -> str:
    """Says how the updates were sent over the emulated radio channel."""
    return (
        f"emulated channel: power lowered for {channel.lowered} of {channel.updates} updates; the device with the best channels "
        f"spent an epsilon of {channel.epsilon:.3g}"
    )


def metrics_in_words(summary: Summary) -> list[str]:
    """Says how answers were measured before and after, as a mean over devices; one sentence, or none."""
    before = mean_metrics(device.metrics_before for device in summary.devices)
    after = mean_metrics(device.metrics_after for device in summary.devices)
    names = dict.fromkeys((*before, *after))
    said = [f"{name} {human_number(before.get(name), 3)} -> {human_number(after.get(name), 3)}" for name in names]
    return [f"answers, mean over devices: {', '.join(said)}"] if said else []


def _change(device: DeviceSummary, measure: str) -> str:
    before, after = before_and_after(device, measure)
    text = f"{human_measure(measure, before)} -> {human_measure(measure, after)}"
    return text if after is None else text.replace(" % ->", " ->")  # one unit for both


def _bytes_and_memory(node: DeviceSummary | HostSummary) -> list[str]:
    return [human_bytes(count) for count in (node.bytes_up, node.bytes_down, node.peak_rss_bytes)]


def _what_happened(summary: Summary) -> str:
    return f"{summary.state}, {human_count(summary.rounds, 'round')} in {human_seconds(summary.seconds)}"
