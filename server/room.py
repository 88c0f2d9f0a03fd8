"""Room on the disk of a run's folder: a full disk makes a run wait until there is room again, instead of ending it.

Knows sizes and the clock; does not know what is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgelam_fl.errors import RunFailed
from edgelam_fl.files import free_bytes, is_full, say
from edgelam_fl.telemetry.events import DiskFull, Emit
from edgelam_fl.telemetry.human import human_bytes
from server.exchange import ExchangeTiming

SIGN_OF_LIFE_S = 10.0
PATIENCE_S = 1800.0
"""How long somebody has to free the disk, before the run ends with what is kept."""


class Room:
    """Waits for room in one folder, and says so every few seconds."""

    def __init__(
        self, folder: Path, emit: Emit, timing: ExchangeTiming, free: Callable[[Path], int] = free_bytes
    ) -> None:
        self._folder, self._emit, self._timing, self._free = folder, emit, timing, free

    def await_bytes(self, needed: int) -> None:
        """Returns once so many bytes are free. Raises RunFailed if that takes too long."""
        self._wait(lambda: self._free(self._folder) >= needed, needed)

    def store(self, write: Callable[[], object], needed: int) -> None:
        """Calls `write` until no full disk stops it; `needed`: about how many bytes it writes, for the message. Raises RunFailed
        if that takes too long, and whatever else `write` raises.
        """

        def is_written() -> bool:
            try:
                write()
            except OSError as error:
                if is_full(error):
                    return False
                raise
            return True

        self._wait(is_written, needed)

    def _wait(self, is_done: Callable[[], bool], needed: int) -> None:
        began = self._timing.now()
        while not is_done():
            waited_s, free = self._timing.now() - began, self._free(self._folder)
            words = (
                f"{human_bytes(free)} are free on the disk of the run's folder, and {human_bytes(needed)} are needed"
            )
            if waited_s >= PATIENCE_S:
                raise RunFailed(f"the disk has been full for {waited_s / 60:.0f} minutes: {words}")
            say(f"the run waits for room: {words}; it goes on by itself once there is room")
            self._emit(DiskFull(free_bytes=free, needed_bytes=needed, waited_s=round(waited_s, 1)))
            self._timing.sleep(SIGN_OF_LIFE_S)
