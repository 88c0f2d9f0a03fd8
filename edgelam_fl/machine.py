"""What a process asks of its machine: free memory, within a container's limit, free disk space, its own memory, its processor's
heat, the time since boot, and to end with the process that started it; and the names of chips to compute on. Knows no models.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edgelam_fl.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")
CHIPS = (
    "auto",
    "cpu",
    "cuda",
    "mps",
    "xpu",
)  # what --device takes, and "cuda:1" and the like; which are here: `model.chip`
_UNLIMITED = 2**63


class _Version(NamedTuple):
    """One version of control groups: their folder, the own group's mark in /proc/self/cgroup, and a group's files."""

    folder: str
    mark: str
    limit: str
    used: str
    cached: tuple[str, str]


_VERSIONS = (
    _Version("", "0::", "memory.max", "memory.current", ("inactive_file", "active_file")),
    _Version(
        "memory", ":memory:", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)  # fmt: skip


def end_with_parent(grace_s: float = 8.0, poll_s: float = 1.0) -> None:
    """Ends this process when the one that started it ends: politely at first (SIGTERM), and `grace_s` seconds later for sure.

    Looks every `poll_s` seconds, on a thread of its own. So nothing is left if the parent is killed: on Linux the kernel sends SIGTERM,
    if it was asked to, but neither waits for its effect nor repeats it; other systems send nothing.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def check_chip(asked: str) -> None:
    """Raises ConfigError for a word that cannot be a --device, whatever this machine has."""
    kind, colon, number = asked.partition(":")
    if kind not in CHIPS or (colon and (kind not in ("cuda", "xpu") or not number.isdecimal())):
        raise ConfigError(
            f"--device {asked!r} is no chip to compute on; allowed: auto, cpu, cuda, cuda:0, cuda:1 ..., mps, xpu, xpu:0 ..."
        )


def memory_free_bytes(cgroup: Path = CGROUP, own: str = "") -> int:
    """Returns how much memory can be taken before the kernel kills something: the least of machine and control groups.

    own: this process's control group, by default the one that the kernel names. The groups above it limit it too; in a
    container its own is the root.
    """
    import psutil

    found = [int(psutil.virtual_memory().available)]
    for version in _VERSIONS:
        root = cgroup / version.folder
        group = root / (own or _own_group(version)).strip("/")
        found += [_left(each, version) for each in (group, *group.parents) if each.is_relative_to(root)]
    return min(found)


def resident_bytes() -> int:
    """Returns the resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _own_group(version: _Version) -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(version.mark)[2] for line in lines if version.mark in line), "")


def _left(group: Path, version: _Version) -> int:
    """Returns what a group's limit leaves; without a limit, more than any machine has."""
    try:
        limit = (group / version.limit).read_text(encoding="ascii").strip()
        used = int((group / version.used).read_text(encoding="ascii"))
        return _UNLIMITED if limit == "max" else max(0, int(limit) - used + _cached(group, version))
    except (OSError, ValueError):
        return _UNLIMITED


def _cached(group: Path, version: _Version) -> int:
    """Counts the bytes of file pages, which a group counts as used and gives back on demand."""
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in version.cached)


def since_boot_s() -> float:
    """Returns the seconds since this machine started, which nobody can set; on Linux with the time that it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


def disk_free_bytes(folder: Path) -> int:
    """Returns the free space of the file system that `folder` is on, or would be on once made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def peak_rss_bytes() -> int:
    """Returns the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------- heat


class Heat(NamedTuple):
    """The processor's heat, and the reason why it computes slower than it could; known on Linux, on most machines."""

    celsius: float | None
    """The hottest part of the processor; None: nobody tells."""
    slowed: str
    """Why it is slowed down now, in words; "": it is not, or nobody tells."""


_PROCESSOR_ZONES = ("cpu", "soc", "x86_pkg", "package", "core")  # in the names of what the kernel measures
_THROTTLED = {  # bits of the Raspberry Pi's firmware, of what holds now
    0: "too little voltage: the power supply or its cable is too weak",
    1: "its frequency is capped",
    2: "it is throttled",
    3: "it is at its limit of temperature",
}


def heat(system: Path = Path("/sys")) -> Heat:
    """Reads the processor's temperature, and whether it is slowed down. system: where the kernel shows it."""
    zones = list(_zones(system / "class" / "thermal"))
    of_processor = [celsius for kind, celsius in zones if any(word in kind for word in _PROCESSOR_ZONES)]
    known = of_processor or [celsius for _, celsius in zones]
    return Heat(max(known, default=None), _slowed(system))


def _zones(folder: Path) -> Iterator[tuple[str, float]]:
    """Yields (kind, degrees Celsius) of each zone that the kernel measures."""
    for zone in sorted(folder.glob("thermal_zone*")):
        try:
            celsius = int((zone / "temp").read_text(encoding="ascii")) / 1000
            kind = (zone / "type").read_text(encoding="ascii").strip().lower()
        except (OSError, ValueError):
            continue
        if 0 < celsius < 150:  # a sensor that is not there says 0 or worse
            yield kind, celsius


def _slowed(system: Path) -> str:
    try:  # a Raspberry Pi's firmware
        text = (system / "devices/platform/soc/soc:firmware/get_throttled").read_text(encoding="ascii")
        bits = int(text, 16)
        return "; ".join(words for bit, words in _THROTTLED.items() if bits >> bit & 1)
    except (OSError, ValueError):
        pass
    for device in sorted((system / "class" / "thermal").glob("cooling_device*")):
        try:
            kind = (device / "type").read_text(encoding="ascii").strip().lower()
            state = int((device / "cur_state").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if state > 0 and ("cpufreq" in kind or kind == "processor"):
            return "the kernel keeps its frequency down, since it is hot"
    return ""
