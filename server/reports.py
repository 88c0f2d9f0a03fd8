"""What cannot be in a node's report: numbers that nobody measures, lists and texts beyond what its plan leads to.

Losses may be infinite or not a number, since training can diverge. Knows neither tensors nor what a contribution may weigh
(`server.replies` does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from edgelam_fl.wire import edgelam_pb2 as pb

_LOSSES = {"loss_sum", "eval_loss_sum", "eval_sums"}
_ROWS_PER_ROUTE = 400  # kinds of frames, on two links, both ways, and room
_INTERVALS = 1000
_METRICS = 200  # of a radio task: one per SNR or speed and method
_LONGEST_TEXT = 2000  # characters
_HARMLESS = (int, bytes)  # whatever their value; bool is an int
_SINGLE = (str, float, Message)


def report_problem(report: pb.JobReport, plan: pb.Plan) -> str:
    """Returns what cannot be in the report of a plan; empty: nothing. Looks at everything but the contributions."""
    rows = _ROWS_PER_ROUTE * (1 + len(plan.serves))
    lengths = {
        "steps": (len(report.steps), plan.steps),
        "rows of bytes": (max(len(report.bytes), len(report.host.bytes)), rows),
        "intervals": (len(report.timeline), _INTERVALS),
        "metrics": (len(report.eval_sums), _METRICS),
        "devices left out": (len(report.host.left_out), len(plan.serves)),
        "gradients": (report.host.gradients, len(plan.serves) * plan.steps),
        "clipped gradients": (report.host.gradients_clipped, report.host.gradients),
    }
    for what, (count, most) in lengths.items():
        if count > most:
            return f"its report has {count} {what}; its plan leads to {most} at most"
    steps = [step.step for step in report.steps]
    if any(step >= plan.steps for step in steps):
        return f"its report has a step {max(steps)}; its plan has {plan.steps}"
    served = {route.device for route in plan.serves}
    if not {left.device for left in report.host.left_out} <= served:
        return "its report leaves out a device that its plan does not name"
    return next(_impossible(report), "")


def _impossible(message: Message) -> Iterator[str]:
    """Yields the numbers and texts of a message, and of those in it, that cannot be."""
    for field, value in message.ListFields():
        if isinstance(value, _HARMLESS) or field.name == "contributions":
            continue
        for one in _each(value):
            if isinstance(one, Message):
                yield from _impossible(one)
            elif isinstance(one, str) and len(one) > _LONGEST_TEXT:
                yield f"its report's {field.name} has {len(one)} characters; allowed: {_LONGEST_TEXT}"
            elif isinstance(one, float) and (one < 0 or (field.name not in _LOSSES and not math.isfinite(one))):
                yield f"its report's {field.name} is {one}"


def _each(value: Any) -> Iterable[Any]:
    if isinstance(value, _SINGLE):
        return (value,)
    return value.values() if isinstance(value, Mapping) else value
