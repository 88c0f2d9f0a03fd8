"""Virtual time: what the wireless model says of a round's devices before it, and of the round once it is over.

Before a device was in a round, its load is estimated; then what it moved and trained in its last one is taken. Knows nothing
of how long anything really took.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgelam_fl.config import RunConfig
from edgelam_fl.model.source import ModelSource
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wireless.cell import Cell
from edgelam_fl.wireless.rounds import Load, part_of, virtual_round
from server.contributions import Reply
from server.loads import Loads
from server.reports import traffic
from strategies.base import Candidate


class VirtualTime:
    def __init__(self, config: RunConfig, source: ModelSource) -> None:
        self.config = config
        self.cell = Cell(config.wireless, config.run.seed)
        self.loads = Loads(config, source)
        self._moved: dict[str, Load] = {}  # by device, in its last round

    def candidates(self, number: int, devices: Sequence[pb.Profile], known: Sequence[Candidate]) -> list[Candidate]:
        """`known`, with what holds in the cell in round `number` in the place of what was measured."""
        expected = self.expected(devices)
        together = min(self.config.federation.devices_per_round or len(devices), len(devices))
        found = []
        for facts in known:
            part = part_of(self.cell, facts.name, number, expected[facts.name], together)
            facts = replace(facts, payload_bytes=part.bytes_up, compute_s=part.before_sending_s)
            found.append(replace(facts, snr=part.snr, limit_bps=None))
        return found

    def expected(self, devices: Sequence[pb.Profile]) -> dict[str, Load]:
        """Of those that were in no round the estimate, scaled by what it was off for the others."""
        estimates = {device.name: self.loads.estimate(device) for device in devices}
        pairs = [(self._moved[name], estimates[name]) for name in estimates if name in self._moved]
        sent = _ratio([(moved.bytes_up, guess.bytes_up) for moved, guess in pairs])
        computed = _ratio([(moved.operations, guess.operations) for moved, guess in pairs])
        scaled = {
            name: replace(guess, bytes_up=sent * guess.bytes_up, operations=computed * guess.operations)
            for name, guess in estimates.items()
        }
        return {name: self._moved.get(name, load) for name, load in scaled.items()}

    def dropouts(self, number: int, attempt: int, names: Sequence[str]) -> list[str]:
        """Who of the chosen does not deliver; enough for a round always do."""
        return self.cell.dropouts(names, number, attempt, self.config.federation.min_nodes)

    def over(
        self, number: int, shares: Mapping[str, float], dropped: Collection[str], received: Mapping[str, int],
        replies: Mapping[str, Reply],
    ) -> dict[str, Any]:  # fmt: skip
        """Round `number` as it went for those who replied, for round_done; the next rounds expect the same of them.

        `received`: bytes of the adapter that each was sent.
        """
        delivered = sorted(name for name in shares if name in replies)
        self._moved |= {name: self._load(name, received.get(name, 0), replies[name]) for name in delivered}
        parts = {name: part_of(self.cell, name, number, self._moved[name], len(delivered)) for name in delivered}
        return virtual_round(self.config.wireless, parts, shares, sorted(dropped))

    def _load(self, name: str, received_bytes: int, reply: Reply) -> Load:
        moved = traffic(reply.report.bytes, reply.of_scope("ends"), received_bytes)
        return Load(
            bytes_up=moved["adapter_bytes_up"] + moved["bytes_up"],
            adapter_bytes_down=moved["adapter_bytes_down"],
            data_bytes_down=moved["bytes_down"],
            operations=reply.report.tokens_trained * self.loads.operations_a_token(name),
        )


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """Measured to estimated, of all together; 1 where nothing was measured."""
    estimated = sum(guess for _, guess in pairs)
    return sum(value for value, _ in pairs) / estimated if estimated else 1.0
