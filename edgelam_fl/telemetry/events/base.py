"""What events have in common. Knows no event."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelam_fl.telemetry.human import human_count


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, written as one line of JSON. Names of fields end in their unit."""

    time: float | None = None
    """Unix seconds at which the line was written; None before that."""


_MANY = 0.05  # of a device's examples; more of them are worth a warning


@dataclass(frozen=True, kw_only=True)
class DataCounts:
    """Counts of what is not used of a device's data, or not whole. No text, no name and no place is in it."""

    bad: int = 0
    """Examples left out since they cannot be read, or the chat template refuses them (data.bad_lines = "skip")."""
    skipped: int = 0
    """Examples that were left out because task.max_tokens leaves nothing of them to learn."""
    cut: int = 0
    """Examples that lost a part because they are longer than task.max_tokens."""
    cut_answers: int = 0
    """Examples among these whose answer lost a part, which is never learned."""
    unread_fields: int = 0
    """Fields of the data that nothing is learned from."""
    unmeasured: int = 0
    """Held-out examples that are not measured either, because of federation.evaluate_examples."""

    def in_words(self, examples: int, held_out: int, max_tokens: int | None = None) -> tuple[str, ...]:
        """Returns a sentence for each count that is not 0, without a full stop; a large share becomes a warning with the way out.

        `examples`, `held_out`: what is learned and measured. `max_tokens`: task.max_tokens; None: not known.
        """
        given = examples + held_out + self.unmeasured + self.skipped + self.bad
        limit = "task.max_tokens" if max_tokens is None else f"task.max_tokens = {max_tokens}"
        longer = "raise task.max_tokens, or shorten them"
        said = [
            _share(self.cut, given, f"were cut ({limit}{self._of_answers()})", longer),
            _share(self.skipped, given, f"were left out as too long ({limit})", longer),
            _share(self.bad, given, "were left out as they cannot be read", "mend them; the device names their places"),
        ]
        if self.unread_fields:
            said.append(f"nothing is learned from {human_count(self.unread_fields, 'field')} of the data (data.fields)")
        if self.unmeasured:
            said.append(
                f"{held_out} of {held_out + self.unmeasured} held-out examples are measured (federation.evaluate_examples)"
            )
        if not held_out:
            said.append("no example is held out, so nothing is measured there (data.held_out, --eval-data)")
        return tuple(filter(None, said))

    def _of_answers(self) -> str:
        return f"; {human_count(self.cut_answers, 'answer')} lost a part" if self.cut_answers else ""


def _share(count: int, given: int, what: str, way_out: str) -> str:
    if not count:
        return ""
    said = f"{count} of {human_count(given, 'example')} {what}"
    return f"WARNING: {said}; {way_out}" if count > _MANY * given else said


@dataclass(frozen=True, kw_only=True)
class UnknownEvent(Event):
    """An event of a kind that this version does not know, as a newer version may write."""

    kind: str
    """Name of the kind in the file."""
    fields: Mapping[str, Any]
    """All fields of the line."""


Emit = Callable[[Event], None]  # takes an event as it happens
