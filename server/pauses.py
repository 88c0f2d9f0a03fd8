"""Nodes that fail again and again, and the rounds that each sits out for it. Knows nothing about what a node does in a round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_MOST_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class Pause:
    """One node's failures in a row."""

    failures: int
    last: int
    """The last round that it sits out."""
    reason: str

    def in_words(self) -> str:
        """Returns why the node sits out."""
        times = f"{self.failures} times in a row" if self.failures > 1 else "in its last attempt"
        return f"sits out until round {self.last + 1}: failed {times}: {self.reason}"


class NodePauses:
    """The nodes that failed in their last attempt.

    After one failure a node sits out the rest of the round, after the second the next round as well, then 2, 4, 8 more.
    """

    def __init__(self) -> None:
        self._by_node: dict[str, Pause] = {}

    def state(self) -> dict[str, Any]:
        """Returns all failures, as plain data."""
        return {name: asdict(pause) for name, pause in self._by_node.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` returned."""
        self._by_node = {name: Pause(**pause) for name, pause in state.items()}

    def failed(self, node: str, number: int, reason: str) -> Pause:
        """Notes that a node failed in an attempt at round `number`; returns its pause."""
        before = self._by_node.get(node)
        failures = before.failures + 1 if before is not None else 1
        rounds = min(2 ** (failures - 2), _MOST_ROUNDS) if failures > 1 else 0
        self._by_node[node] = Pause(failures, number + rounds, reason)
        return self._by_node[node]

    def delivered(self, node: str) -> None:
        """Forgets the failures of a node that has delivered."""
        self._by_node.pop(node, None)

    def sitting_out(self, number: int, nodes: Collection[str], least: int) -> dict[str, str]:
        """Returns why nodes sit out round `number`, by name: so few of `nodes` that `least` are left, the worst first."""
        paused = [name for name in nodes if name in self._by_node and number <= self._by_node[name].last]
        paused.sort(key=lambda name: (-self._by_node[name].failures, name))
        return {name: self._by_node[name].in_words() for name in paused[: max(0, len(nodes) - least)]}
