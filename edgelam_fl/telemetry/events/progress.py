"""Progress within a round: where each node is, and where the round is. Written while nodes play their parts, and rarely kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgelam_fl.telemetry.events.base import Event
from edgelam_fl.telemetry.human import human_seconds

LOADING, FETCHING, CONNECTING, MEASURING, ANSWERING, TRAINING = (
    "loading", "fetching", "connecting", "measuring", "answering", "training",
)  # fmt: skip
"""What a node does in its part, in this order; a host is done with these once it serves."""
SERVING, REPORTING = "serving", "reporting"
DOINGS = (LOADING, FETCHING, CONNECTING, MEASURING, ANSWERING, TRAINING, SERVING, REPORTING)


@dataclass(frozen=True, kw_only=True)
class NodeProgress:
    """The place at which a node is in its part of a round."""

    doing: str = LOADING
    """What it does: "loading" (the model), "fetching" (its layers from the hub), "connecting", "measuring" (held-out examples), "answering" (held-out questions), "training",
    "serving" (a host) or "reporting" (its part is over)."""
    step: int = 0
    """Training steps that are over."""
    steps: int = 0
    """Training steps that it takes part in; 0: it only measures."""
    unit: int = 0
    """Micro-batches that are over, of the present step or of measuring; tokens per answer that are over, of answering."""
    units: int = 0
    """Micro-batches of the present step or of measuring, or the most tokens of an answer; 0: none is under way."""
    loss: float | None = None
    """Mean loss per label in its newest step, in nats or in the unit of a task of values; None before the first, and for a host."""
    tokens: int = 0
    """Tokens that it has trained on in this part."""
    bytes: int = 0
    """Bytes of its layers that have come from the hub."""
    of_bytes: int = 0
    """Bytes of its layers that come from the hub; 0: none do."""

    def words(self) -> str:
        """Returns what it does, in a few words."""
        if self.doing == FETCHING and self.of_bytes:
            return f"fetching layers, {_percent(self.bytes, self.of_bytes)}"
        if self.doing in (MEASURING, ANSWERING) and self.units:
            return f"{self.doing}, {_percent(self.unit, self.units)}"
        if self.doing == TRAINING or (self.doing == SERVING and self.steps):
            return f"step {self.step} of {self.steps}"
        return self.doing


@dataclass(frozen=True, kw_only=True)
class RoundProgress(Event):
    """A sign of life while nodes play their parts. The newest is in RUN/progress.json, which exists as long as they play; into
    events.jsonl it is written after 30 s of an attempt, 1 min, 2 min, 4 min and so on, without the nodes.

    Nobody knows of a step whose nodes do not attend at a hub and are not processes of the command that shows the run.
    """

    round: int
    """Number of the round."""
    attempt: int
    """Number of the attempt at it."""
    seconds: float
    """Seconds since it began."""
    doing: str
    """What the devices and hosts that are least far do, as in `NodeProgress`."""
    step: int = 0
    """Training steps that all devices have done."""
    steps: int = 0
    """Training steps of the round; 0: it only measures, or its devices have not begun."""
    done: float = 0.0
    """Share of what they do now that is done, in [0, 1]: of the layers that come, of the measuring, of the answers or of the training."""
    loss: float | None = None
    """Mean over the devices of the loss of their newest step, in nats or in the unit of a task of values; None before the first."""
    tokens_per_s: float | None = None
    """Tokens that all devices train on per second; None before a step is over."""
    left_s: float | None = None
    """Seconds until the devices have trained, if they go on as fast as so far; None if that cannot be said yet."""
    slowest: str = ""
    """The node that the others wait for: with the most left to do; "" if none stands out."""
    nodes: Mapping[str, NodeProgress] | None = None
    """The place of each node; None in events.jsonl."""

    def words(self) -> str:
        """Returns the event in words, without the round's number and without a full stop."""
        if self.doing == TRAINING:
            said = [f"step {self.step} of {self.steps}"]
            said += [f"loss {self.loss:.3f}"] if self.loss is not None else []
            said += [f"{self.tokens_per_s:,.0f} tokens/s"] if self.tokens_per_s else []
            said += [f"about {_about(self.left_s)} left"] if self.left_s is not None else []
            return ", ".join(said) + (f"; slowest: {self.slowest}" if self.slowest else "")
        share = f", {_percent(self.done, 1)}" if self.done else ""
        of = f" ({self.slowest})" if self.slowest else ""
        return _WORDS.get(self.doing, self.doing) + share + of


_WORDS = {
    LOADING: "loading the model",
    FETCHING: "fetching layers from the server",
    CONNECTING: "connecting",
    MEASURING: "measuring on held-out examples",
    ANSWERING: "answering held-out questions",
    REPORTING: "sending what was learned",
}


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else human_seconds(seconds)


def _percent(part: float, whole: float) -> str:
    return f"{100 * min(1.0, part / whole):.0f} %"
