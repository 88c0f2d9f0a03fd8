"""What a node keeps for the cache of fronts: as a host, devices' states on its disk; as a device, the secret of their names.

A host has one file per device, without a name in the folder: the system removes it when the process ends, however it ends. What a
file holds is in memory, with a digest of each entry. Nothing is ever replaced: epochs come by all examples in turn, so a cache that
made room for the newest would always lack the next.

Knows files and tensors; knows neither links nor layers. Neighbour: `split.fronts` says what is kept.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from edgelam_fl.files import free_bytes, write_private
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.stage import Stage
from edgelam_fl.split.fronts import NamedFronts, SentFronts
from edgelam_fl.wire import edgelam_pb2 as pb

_ENTRY_BYTES = 512  # what an entry costs beside its states: a device may send many that are small
_NUMBER_BYTES, _DIGEST_BYTES, _SECRET_BYTES = 8, 16, 32
_PREFIX = ".tmp-fronts-"  # `files.sweep` removes what has it
_SECRET_FILE = "front-secret"


@dataclass
class _OfDevice:
    """One device's states: its file, and where each entry is."""

    file: BinaryIO
    used_bytes: int = 0  # with what entries cost in memory
    end: int = 0  # of the file
    entries: dict[bytes, tuple[int, tuple[int, int], torch.dtype, bytes]] = field(default_factory=dict)


class RunFronts:
    """The states that one host keeps of the devices of one run."""

    def __init__(self, run: str, folder: Path | None, free: Callable[[Path], int]) -> None:
        """`folder`: None for the system's temporary files. `free`: returns the bytes that are free on the disk of a folder."""
        self.run, self.number = run, secrets.token_bytes(_NUMBER_BYTES)
        self._folder, self._free = Path(tempfile.gettempdir()) if folder is None else folder, free
        self._most_bytes = self._share_bytes = 0
        self._devices: dict[str, _OfDevice] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Counts the bytes of all that is kept."""
        return sum(one.used_bytes for one in self._devices.values())

    def allow(self, most_bytes: int, devices: int) -> None:
        """Sets how much may be kept of all devices together, of which each gets the same part."""
        self._most_bytes, self._share_bytes = most_bytes, most_bytes // max(1, devices)

    def find(self, device: str, name: bytes, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        with self._lock:
            of_device = self._devices.get(device)
            entry = of_device.entries.get(name) if of_device is not None else None
            if of_device is None or entry is None or entry[1:3] != (shape, dtype):
                return None
            offset, _, _, digest = entry
            data = bytearray()
            with suppress(OSError):
                data = bytearray(os.pread(of_device.file.fileno(), shape[0] * shape[1] * dtype.itemsize, offset))
            if _digest(data) != digest:
                del of_device.entries[name]
                return None
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def keep(self, device: str, name: bytes, states_TD: torch.Tensor) -> None:
        data = states_TD.contiguous().view(torch.uint8).numpy().tobytes()
        cost = len(data) + _ENTRY_BYTES
        with self._lock, suppress(OSError):  # a disk that takes nothing costs bytes on the link, and nothing else
            of_device = self._devices.get(device)
            used = of_device.used_bytes if of_device is not None else 0
            known = of_device is not None and name in of_device.entries
            if self._closed or known or used + cost > self._share_bytes or not self._has_room(cost):
                return
            if of_device is None:
                file = tempfile.TemporaryFile(dir=self._folder, prefix=_PREFIX, buffering=0)  # noqa: SIM115 - open as long as the run
                of_device = self._devices.setdefault(device, _OfDevice(file))
            if os.pwrite(of_device.file.fileno(), data, of_device.end) != len(data):
                return
            shape = (states_TD.shape[0], states_TD.shape[1])
            of_device.entries[name] = of_device.end, shape, states_TD.dtype, _digest(data)
            of_device.end += len(data)
            of_device.used_bytes += cost

    def _has_room(self, cost: int) -> bool:
        """Returns whether so many bytes more are allowed, and leave at least as much of the disk as they take with the rest."""
        used = self.used_bytes + cost
        return used <= self._most_bytes and used <= self._free(self._folder)

    def close(self) -> None:
        """Removes all that is kept."""
        with self._lock:
            self._closed = True
            for one in self._devices.values():
                one.file.close()
            self._devices.clear()


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


class FrontCache:
    """The states that a node keeps as a host, of one run at a time."""

    def __init__(self, state: Path | None, free: Callable[[Path], int] = free_bytes) -> None:
        """`state`: the node's folder; None: the states are among the system's temporary files. `free`: as of `RunFronts`."""
        self._folder, self._free = state, free
        self._lock = threading.Lock()
        self._fronts: RunFronts | None = None
        self._timer: threading.Timer | None = None

    def begin(self, plan: pb.Plan) -> RunFronts | None:
        """Returns where a part keeps states; None if its plan keeps none. What an earlier run kept is removed."""
        with self._lock:
            self._end_timer()
            if self._fronts is not None and (self._fronts.run != plan.run or not _keeps(plan)):
                self._remove()
            if not _keeps(plan):
                return None
            if self._fronts is None:
                self._fronts = RunFronts(plan.run, self._folder, self._free)
            self._fronts.allow(plan.front_cache_bytes, len(plan.serves))
            return self._fronts

    def end(self, plan: pb.Plan) -> None:
        """Ends a part: after a run's last one, the evaluation of its result, all is removed; else if no other comes within a round's time."""
        with self._lock:
            if self._fronts is None or self._fronts.run != plan.run:
                return
            if not plan.steps:
                self._remove()
                return
            self._end_timer()
            self._timer = threading.Timer(plan.deadlines.round_s, self._forget, [self._fronts])
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """Removes all that is kept."""
        with self._lock:
            self._end_timer()
            self._remove()

    def _forget(self, fronts: RunFronts) -> None:
        with self._lock:
            if self._fronts is fronts and self._timer is threading.current_thread():
                self._remove()

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _remove(self) -> None:
        if self._fronts is not None:
            self._fronts.close()
            self._fronts = None


def _keeps(plan: pb.Plan) -> bool:
    """Returns whether the plan's node keeps states: as the first host of its routes."""
    return bool(plan.front_cache_bytes and plan.serves and plan.serves[0].hops[0].node == plan.node)


class NamesFronts:
    """Names the states of a device's fronts, in any run, and knows what it has sent to which host."""

    def __init__(self, state: Path | None) -> None:
        """`state`: the node's folder; None: the names are others after a restart."""
        self._state, self._secret = state, b""
        self._run, self._sent = "", SentFronts()

    def of(self, plan: pb.Plan, front: Stage) -> NamedFronts | None:
        """Returns what names the states of a plan's device; None if the plan has hosts keep none."""
        if not plan.front_cache_bytes:
            return None
        self._secret = self._secret or front_secret(self._state)
        if plan.run != self._run:
            self._run, self._sent = plan.run, SentFronts()
        model, adapter = plan.model, adapters.digest(front.adapter() | front.carry())
        cut = plan.routes[0].front
        meaning = "/".join([plan.run, model.digest, model.base, model.compute, model.wire, str(cut), adapter])
        return NamedFronts(self._secret, meaning, self._sent)


def front_secret(state: Path | None) -> bytes:
    """Returns the secret by which a device names its states, the same over restarts; with no folder, a new one.

    A disk that does not take it costs what the hosts have under the names of the process before.
    """
    file = None if state is None else state / _SECRET_FILE
    if file is not None:
        with suppress(OSError):
            kept = file.read_bytes()
            if len(kept) == _SECRET_BYTES:
                return kept
    made = secrets.token_bytes(_SECRET_BYTES)
    if file is not None:
        with suppress(OSError):
            write_private(file, made, durable=True)
    return made
