"""The parts that a node has accepted last, noted on its disk: a stage host that was started again knows which ones it lost.

Knows names alone. A note that cannot be written costs others patience, never a part.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from edgelam_fl.files import write_private

_FILE, _MOST = "accepted.json", 8


class AcceptedParts:
    """The names of the parts that this process and the one before it accepted."""

    def __init__(self, state: Path | None) -> None:
        """Reads what the process before has noted. `state`: the node's folder; None: nothing stays."""
        self._file = state / _FILE if state is not None else None
        self._before = self._read()
        self._names = list(self._before)

    def note(self, part: str) -> None:
        """Notes a part that this process has accepted."""
        self._names = [*(name for name in self._names if name != part), part][-_MOST:]
        if self._file is not None:
            with suppress(OSError):
                write_private(self._file, json.dumps(self._names))

    def was_before(self, part: str) -> bool:
        """Returns whether the process before this one had accepted the part."""
        return part in self._before

    def knows(self, part: str) -> bool:
        """Returns whether this process or the one before it has accepted the part."""
        return part in self._names

    def _read(self) -> frozenset[str]:
        if self._file is None:
            return frozenset()
        try:
            names = json.loads(self._file.read_text(encoding="utf-8"))
            return frozenset(str(name) for name in names)
        except (OSError, ValueError, TypeError):
            return frozenset()
