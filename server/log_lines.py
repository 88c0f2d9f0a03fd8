"""Writes a round's numbers as lines for `flwr log`: the means over devices, as Flower's own strategies log them, and each device's.

Knows the round's event alone; the terminal of `edgelam run` has lines of its own (`telemetry.console`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from edgelam_fl.telemetry.events import DeviceResult, RoundDone
from edgelam_fl.telemetry.human import human_bytes, human_count, human_seconds
from edgelam_fl.telemetry.measures import MEASURES, human_measure
from edgelam_fl.telemetry.summary import is_training_round, pooled


def lines_of(done: RoundDone, rounds: int) -> Iterator[str]:
    """Yields a line for the round, of so many in the run, and one per device. A number that was not measured is left out."""
    trains = is_training_round(done)
    what = f"round {done.round} of {rounds}" if trains else "last evaluation"
    yield f"{what} took {human_seconds(done.seconds)}; over {human_count(len(done.devices), 'device')}: {_joined(_means(done.devices, trains))}"
    for device in done.devices:
        yield f"  {device.name}: {_joined(_numbers(device, trains))}"


def _joined(numbers: Iterable[str]) -> str:
    return ", ".join(numbers) or "nothing was measured"


def _means(devices: Sequence[DeviceResult], trains: bool) -> Iterator[str]:
    """Yields means over the labels of all devices."""
    labels = sum(device.labels for device in devices if device.loss is not None)
    if labels:
        loss = math.fsum(device.loss * device.labels for device in devices if device.loss is not None) / labels
        yield f"train loss {loss:.4f}"
    when, held_out = _when(trains), pooled(devices)
    if not held_out:
        yield "nothing held out was measured"
    for measure, value in held_out.items():
        yield f"held-out {measure} {_number(measure, value)}{when}"
        if measure == "perplexity" and 0 < value < math.inf:
            yield f"held-out loss {math.log(value):.4f}{when}"


def _numbers(device: DeviceResult, trains: bool) -> Iterator[str]:
    if device.examples is not None:
        yield f"{device.examples} examples"
    if device.loss is not None:
        yield f"train loss {device.loss:.4f}"
    measured = {"perplexity": device.perplexity, **device.metrics}
    for measure, value in measured.items():
        if value is not None:
            yield f"held-out {measure} {_number(measure, value)}{_when(trains)}"
    if device.tokens and device.train_seconds:
        yield f"{device.tokens / device.train_seconds:.0f} tokens/s"
    if device.bytes_up is not None and device.bytes_down is not None:
        yield f"sent {human_bytes(device.bytes_up)}, received {human_bytes(device.bytes_down)}"


def _number(measure: str, value: float) -> str:
    """Writes a held-out value: a measure in dB as people read it, any other as it is."""
    in_db = measure in MEASURES and MEASURES[measure].decibels
    return human_measure(measure, value) if in_db else f"{value:.4f}"


def _when(trains: bool) -> str:
    """Says of which adapter a held-out number is: a round measures the one that it starts from."""
    return " at its start" if trains else ""
