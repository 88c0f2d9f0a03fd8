"""Writes constraints/boards.lock and constraints/torch-aarch64.lock: version and hashes of each package that a board gets.

    python -m tools.board_lock

Resolved by uv for Linux arm64 and the oldest Python that is supported; the hashes are those of every build of a version, so that other
machines use the same file. PyTorch has a file of its own: its build for x86-64 on the index brings CUDA, and the CPU build is elsewhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints"
LOCK, TORCH = CONSTRAINTS / "boards.lock", CONSTRAINTS / "torch-aarch64.lock"
_HEAD = "# Written by `python -m tools.board_lock`: {what}, with the hashes of all builds of a version.\n"
_ENTRY = re.compile(r"^\S.*?(?=^\S|\Z)", flags=re.MULTILINE | re.DOTALL)


def split_lock(text: str) -> tuple[str, str]:
    """Returns (lock without torch, lock of torch alone) of what uv printed."""
    entries = [entry for entry in _ENTRY.findall(text) if not entry.startswith("#")]
    of_torch = [entry for entry in entries if entry.startswith("torch==")]
    others = [entry for entry in entries if entry not in of_torch]
    return (
        _HEAD.format(what="what edgelam-fl needs, but for PyTorch") + "".join(others),
        _HEAD.format(what="PyTorch for Linux arm64") + "".join(of_torch),
    )


def main() -> None:
    """Asks the package index, and writes both files."""
    command = [
        str(Path(sys.executable).parent / "uv"), "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--no-annotate",
        "--generate-hashes", "--python-platform", "aarch64-unknown-linux-gnu", "--python-version", "3.11",
        "--constraint", "constraints/tested.txt", "--constraint", "constraints/torch.txt",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    for file, text in zip((LOCK, TORCH), split_lock(done.stdout), strict=True):
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
