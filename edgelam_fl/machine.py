"""What is free on this machine: memory, with a container's limit in it, and disk."""

from __future__ import annotations

import shutil
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 2**63


def memory_free_bytes(cgroup: Path = CGROUP, own: str = "") -> int:
    """What can be taken before something is killed: the machine's, or what the limit of a control group leaves, if less.

    `own`: this process's group, by default what the kernel says. The groups above it limit it too; in a container its
    own is the root.
    """
    import psutil

    group = cgroup / (own or _own_group()).strip("/")
    groups = [group, *(parent for parent in group.parents if parent.is_relative_to(cgroup))]
    return min([int(psutil.virtual_memory().available), *map(_left, groups)])


def _own_group() -> str:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")


def _left(group: Path) -> int:
    """What a group's limit leaves; more than any machine has, where there is none."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return _UNLIMITED if limit == "max" else max(0, int(limit) - used + _cached(group))
    except (OSError, ValueError):
        return _UNLIMITED


def _cached(group: Path) -> int:
    """File pages, which count as used and are given back when asked for."""
    lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))


def disk_free_bytes(folder: Path) -> int:
    """Of the file system that `folder` is on, or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
