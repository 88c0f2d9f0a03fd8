"""Virtual time: what the wireless model predicts of a round's devices, and computes of the round when it is over.

A device's load is that of its last round, and an estimate before its first. Knows nothing of how long anything really took.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import VirtualRound
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wireless.cell import RadioCell
from edgelam_fl.wireless.rounds import Load, device_round, virtual_round
from server.replies import Reply
from server.virtual.loads import Loads
from strategies.api import Candidate


class VirtualTime:
    def __init__(self, spec: RunSpec) -> None:
        self.config = spec.config
        self.cell = RadioCell(self.config.wireless, self.config.run.seed)
        self.loads = Loads(spec)
        self._moved: dict[str, Load] = {}  # by device, in its last round

    def state(self) -> dict[str, Any]:
        """Returns what the rounds so far have taught, as plain data."""
        return {name: asdict(load) for name, load in self._moved.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` returned."""
        self._moved = {name: Load(**load) for name, load in state.items()}

    def candidates(self, number: int, devices: Sequence[pb.Profile], known: Sequence[Candidate]) -> list[Candidate]:
        """Returns `known` with the cell's values for round `number` in the place of measured ones."""
        expected = self.expected(devices)
        together = min(self.config.federation.devices_per_round or len(devices), len(devices))
        found = []
        for facts in known:
            part = device_round(self.cell, facts.name, number, expected[facts.name], together)
            sends, before_s = part.bytes_up, part.before_sending_s
            found.append(replace(facts, payload_bytes=sends, compute_s=before_s, snr=part.snr, limit_bps=None))
        return found

    def expected(self, devices: Sequence[pb.Profile]) -> dict[str, Load]:
        """Returns each device's load in its last round. A device that was in no round has its estimate, scaled by measured
        to estimated load of the others.
        """
        estimates = {device.name: self.loads.estimate(device) for device in devices}
        known = [name for name in estimates if name in self._moved]
        off = _ratios([self._moved[name] for name in known], [estimates[name] for name in known])
        return {name: self._moved.get(name) or _scaled(guess, off) for name, guess in estimates.items()}

    def dropouts(self, number: int, attempt: int, names: Sequence[str]) -> list[str]:
        """Returns the devices that do not deliver. Enough for a round always do."""
        return self.cell.dropouts(names, number, attempt, self.config.federation.min_nodes)

    def over(
        self, number: int, shares: Mapping[str, float], dropped: Collection[str], received: Mapping[str, int],
        replies: Mapping[str, Reply],
    ) -> VirtualRound:  # fmt: skip
        """Returns round `number` in virtual time, for `round_done`. The next rounds expect the same loads of its devices.

        `received`: bytes of the tensors that each device was sent.
        """
        delivered = sorted(name for name in shares if name in replies)
        self._moved |= {name: self._load(name, received.get(name, 0), replies[name]) for name in delivered}
        parts = {name: device_round(self.cell, name, number, self._moved[name], len(delivered)) for name in delivered}
        return virtual_round(self.config.wireless, parts, shares, sorted(dropped))

    def _load(self, name: str, received_bytes: int, reply: Reply) -> Load:
        """Counts tensors alone: headers of frames and heartbeats depend on the clock, and nothing here may."""
        report = reply.report
        return Load(
            bytes_up=reply.bytes_of("ends") + _tensors(report, "sent"),
            adapter_bytes_down=received_bytes,
            data_bytes_down=_tensors(report, "received"),
            operations=report.tokens_trained * self.loads.operations_per_token(name),
        )


def _tensors(report: pb.JobReport, direction: str) -> int:
    """Returns the bytes of hidden states and gradients on the device's links."""
    return sum(count.payload_bytes for count in report.bytes if count.direction == direction)


def _ratios(measured: Sequence[Load], estimated: Sequence[Load]) -> Load:
    """Returns measured / estimated load, all devices together; 1 if nothing was measured."""

    def ratio(of: str) -> float:
        guess = sum(getattr(load, of) for load in estimated)
        return sum(getattr(load, of) for load in measured) / guess if guess else 1.0

    return Load(**{field.name: ratio(field.name) for field in fields(Load)})


def _scaled(load: Load, by: Load) -> Load:
    return Load(**{field.name: getattr(load, field.name) * getattr(by, field.name) for field in fields(Load)})
