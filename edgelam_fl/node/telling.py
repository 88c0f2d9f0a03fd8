"""Tells those of this machine where a part is: in a file of the node's state folder, while the part is played.

Works on a thread of its own, so that nothing waits for it. Knows neither parts nor who reads the file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.telemetry.progress import write_node_progress

_EVERY_S = 1.0


class Telling:
    """Writes the file whenever something has changed, until `close`."""

    def __init__(self, state: Path, job: str, progress: Callable[[], NodeProgress], every_s: float = _EVERY_S) -> None:
        """`state`: the node's folder. `job`: the part's name. `progress`: returns where it is, on any thread."""
        self._state, self._job, self._progress, self._every_s = state, job, progress, every_s
        self._closed = threading.Event()
        self._told: NodeProgress | None = None
        self._thread = threading.Thread(target=self._tell, name="telling", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says a last time where the part is."""
        self._closed.set()
        self._thread.join()
        self._tell_changes()

    def _tell(self) -> None:
        self._tell_changes()
        while not self._closed.wait(self._every_s):
            self._tell_changes()

    def _tell_changes(self) -> None:
        progress = self._progress()
        if progress != self._told:
            write_node_progress(self._state, self._job, progress)
            self._told = progress
