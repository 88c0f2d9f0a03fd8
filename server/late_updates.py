"""Updates of devices that were late for their round (federation.late = "next"): used in the next round, or dropped.

An update that comes while the next round goes on counts there with half its weight, as a move from that round's start. What
comes later is dropped. Knows nothing about when a device is late (`server.lateness`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgelam_fl.model.adapter import Adapter
from edgelam_fl.telemetry.events import Emit, LateUpdate
from server.exchange import Arrived, Exchange, answer_of
from server.replies import parts_by_site, read_reply, why_unusable
from server.state import PlannedRound, Received
from strategies.api import Contribution

_WEIGHT = 0.5  # of an update that is one round old


@dataclass(slots=True)
class _Late:
    """A device whose update may still come."""

    planned: PlannedRound  # of its round
    contributions: Sequence[Contribution] = ()  # as they came
    problem: str = ""  # why what came cannot be used


class LateUpdates:
    """The devices that were late for the newest finished round."""

    def __init__(self, exchange: Exchange, emit: Emit, factor: float) -> None:
        """`factor`: how many times the largest update of the round a late one may be (federation.update_factor); 0: any size."""
        self._exchange, self._emit, self._factor = exchange, emit, factor
        self._late: dict[str, _Late] = {}  # by name
        self._names: dict[str, str] = {}  # by the ids of messages without an answer

    def add_to(self, planned: PlannedRound, received: Received) -> Received:
        """Returns what an attempt received, and with it what has come of the last round's late devices."""
        self._collect()
        if not any(late.contributions for late in self._late.values()):
            return received
        moved = [_rms(one.tensors, planned.start.adapter) for one in received.contributions]
        most = self._factor * max(moved, default=0.0)
        added = list[Contribution]()
        for name, late in self._late.items():
            start = late.planned.start.adapter
            if any(_rms(one.tensors, start) > most for one in late.contributions) and self._factor:
                late.contributions, late.problem = (
                    (),
                    "its update is far larger than the others' (federation.update_factor)",
                )
            added += [_moved(one, name, late.planned, planned.start.adapter) for one in late.contributions]
        return replace(received, contributions=[*received.contributions, *added])

    def end_round(self, planned: PlannedRound, late: Mapping[str, Sequence[str]]) -> None:
        """Says what became of the last round's late devices, now that the next one is over, and begins to wait for that one's.

        `late`: the ids of the messages to each device that was late for it.
        """
        number = planned.facts.round
        for name, one in self._late.items():
            used, problem = bool(one.contributions), one.problem or f"it has not come by the end of round {number}"
            self._emit(
                LateUpdate(
                    round=one.planned.facts.round, node=name, used_in=number if used else 0,
                    weight=_WEIGHT if used else 0.0, reason="" if used else problem,
                )
            )  # fmt: skip
        self._late = {name: _Late(planned) for name in late}
        self._names = {message_id: name for name, message_ids in late.items() for message_id in message_ids}

    def _collect(self) -> None:
        for message_id, message in self._exchange.arrived(self._names).items() if self._names else ():
            late = self._late[name := self._names.pop(message_id)]
            answer, plan = answer_of(name, message), late.planned.plans[name]
            if not isinstance(answer, Arrived):
                late.problem = answer.reason
                continue
            reply = read_reply(answer.content)
            late.problem = why_unusable(reply, plan, late.planned.starts)
            if not late.problem:
                late.contributions = [one for _, one in parts_by_site(name, reply, plan, late.planned.layout)]


def _moved(one: Contribution, name: str, before: PlannedRound, start: Adapter) -> Contribution:
    """Returns an update of an earlier round as one that began at `start`, under a name of its own."""
    since = before.start.adapter
    tensors = {tensor: array - since[tensor] + start[tensor] for tensor, array in one.tensors.items()}
    return replace(one, source=f"{name} of round {before.facts.round}", weight=_WEIGHT * one.weight, tensors=tensors)


def _rms(tensors: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]) -> float:
    total = sum(float(np.sum((array - start[name]).astype(np.float64) ** 2)) for name, array in tensors.items())
    return (total / max(1, sum(array.size for array in tensors.values()))) ** 0.5
