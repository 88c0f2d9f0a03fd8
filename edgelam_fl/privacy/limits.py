"""Says what hosts can read of a device's text under a plan, and judges it by what the text's owner allows. No torch.

Judges by numbers that were measured before (`known`), on the model as it is published: defences at the cut are not counted,
so a plan with them may leak less than is said here. Knows neither nodes nor messages.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgelam_fl.config import most_read_by_hosts
from edgelam_fl.privacy.known import KnownLeakage

MEASURE = "`edgelam leakage RUN.toml` measures it on this machine"
_OF_VALUES = "not measured: the attacks that are played here read texts"


@dataclass(frozen=True)
class HostReading:
    """The share that hosts can read of the text of a device that keeps `front` and `back` layers at its ends."""

    model: str
    """Name in run files."""
    front: int
    back: int
    known: KnownLeakage | None
    """None: the model was not measured."""
    labels_sent: bool = False
    """Whether the last host gets the labels themselves (split.labels = 'last-stage')."""
    of_values: bool = False
    """Whether the device learns from values, of which nothing was measured, in the place of texts."""

    @property
    def text(self) -> float | None:
        """Share of the text's tokens, in [0, 1]; without a layer in front all of them, of any model. None: not measured."""
        if self.of_values:
            return None
        return self.known.share_read(self.front) if self.known else 1.0 if self.front == 0 else None

    @property
    def labels(self) -> float | None:
        """Share of the labels, from what is sent or from their gradient. None: not measured."""
        if self.labels_sent:
            return 1.0
        share = self.known.share_of_labels(self.back) if self.known else None
        return 1.0 if share is None and self.back == 0 else share

    @property
    def worst(self) -> float | None:
        """The larger share of both; None if the text's was not measured."""
        return None if self.text is None else max(self.text, self.labels or 0.0)

    def words(self) -> str:
        """Says in one sentence, without a full stop, what hosts can read."""
        if self.of_values:
            return f"what a host can read of a device's values is {_OF_VALUES}"
        if self.text is None:
            said = f"what a host can read of a device's text is not measured for {self.model}; {MEASURE}"
        else:
            said = (
                f"a host can read about {percent(self.text)} of the tokens of a device's text "
                f"({self.model}, {layers(self.front)} in front)"
            )
        return said + self._label_words()

    def _label_words(self) -> str:
        if self.labels_sent:
            return "; the last host gets the labels themselves"
        if self.back:
            return ""
        share = self.known.share_of_labels(0) if self.known else None
        measured = "" if share is None else f", {percent(share)} of them as measured"
        return f"; with no layer at the back it can solve for the labels from their gradient{measured}"


def why_refused(trust: str, reading: HostReading) -> str:
    """Returns why an owner who trusts like this allows no such plan with hosts; empty: the plan is allowed.

    trust: as split.trust, which is valid.
    """
    if trust == "hosts":
        return ""
    if trust == "none":
        return "it allows no host, and this plan has some"
    if reading.labels_sent:
        return "it limits what hosts read, and this plan sends the labels to the last host"
    limit, worst = most_read_by_hosts(trust), reading.worst
    if reading.of_values:
        return f"what hosts read is {_OF_VALUES}"
    if worst is None:
        return f"what hosts read is not measured for {reading.model}; {MEASURE}"
    if worst <= limit:
        return ""
    by_text = worst == reading.text
    what, where = (
        ("tokens", f"{layers(reading.front)} in front")
        if by_text
        else ("labels", f"{layers(reading.back)} at the back")
    )
    return f"with {where} hosts can read about {percent(worst)} of the {what}, and it allows {percent(limit)}"


def layers(count: int) -> str:
    """Writes 2 as "2 layers", 1 as "1 layer"."""
    return "1 layer" if count == 1 else f"{count or 'no'} layers"


def percent(share: float) -> str:
    """Writes 0.784 as "78 %"."""
    return f"{100 * share:.0f} %"
