"""Blocks that a process has freed go back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks of 1 MiB, freed below one that stays: once a larger one came and went, they stay resident by themselves.
CHILD = """
import resource, sys
from pathlib import Path
from edgelam_fl.model.allocator import give_back_at_once

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

if sys.argv[1] == "set":
    assert give_back_at_once()
large = b"x" * (2**25 - 2**16)
del large  # where it came and went, glibc raises its limit to its size
before = resident()
blocks = [b"x" * 2**20 for _ in range(64)]
last = b"x" * 2**20
blocks.clear()
print((resident() - before) // 2**20)
"""


def left_over(setting: str) -> int:
    """MiB that stay of 64 MiB which were freed; 1 MiB more is in use."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, setting], capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_do_not_stay() -> None:
    assert left_over("set") <= 2
    assert left_over("unset") >= 32, "glibc gives them back by itself: the setting is not needed any more"
