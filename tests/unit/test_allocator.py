"""Blocks that a process has freed go back to the system, at once or after a part is played."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks of 1 MiB, freed below one that stays: once a larger one came and went, they stay resident by themselves.
CHILD = """
import resource, sys
from contextlib import nullcontext
from pathlib import Path
from edgelam_fl.model.allocator import give_back_at_once, kept_if_roomy

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

if sys.argv[1] != "unset":
    assert give_back_at_once()
large = b"x" * (2**25 - 2**16)
del large  # where it came and went, glibc raises its limit to its size
before = resident()
free_mib = {"room": 1000, "no room": 100}.get(sys.argv[1])
with nullcontext() if free_mib is None else kept_if_roomy(64 << 20, free_mib << 20):
    blocks = [b"x" * 2**20 for _ in range(64)]
    last = b"x" * 2**20
    blocks.clear()
    print((resident() - before) // 2**20)
print((resident() - before) // 2**20)
"""


def left_over(setting: str) -> list[int]:
    """MiB that stay of 64 MiB which were freed, before and after the context is closed; 1 MiB more is in use."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, setting], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(line) for line in done.stdout.split()]


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")


def test_freed_blocks_do_not_stay() -> None:
    assert max(left_over("set")) <= 2
    assert min(left_over("unset")) >= 32, "glibc gives them back by itself: the setting is not needed any more"


def test_freed_blocks_stay_while_there_is_room_for_them() -> None:
    within, after = left_over("room")
    assert within >= 64
    assert after <= 2
    assert max(left_over("no room")) <= 2
