"""Files of this machine: the cache folder, atomic writes, private files, changes. Knows nothing about what files mean."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path


def cache_folder() -> Path:
    """Returns the user's cache folder for models and what is made of them: EDGELAM_CACHE, or the system's place."""
    given = os.environ.get("EDGELAM_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache") / "edgelam-fl"


def home_folder() -> Path:
    """Returns this user's home folder; for a user without one, as in some containers, a folder among the temporary files."""
    home = Path("~").expanduser() if os.environ.get("HOME") else _home_of_the_account()
    return home if home.is_absolute() else Path(tempfile.gettempdir()).absolute() / f"edgelam-{os.getuid()}"


def _home_of_the_account() -> Path:
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path()


def from_home(text: str) -> str:
    """Returns a text with this user's home folder written as ~, for what people share: its path names the user."""
    home = str(home_folder())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?=/|$|[^\w.-])", "~", text)


def now_in_a_name() -> str:
    """Returns the time as a part of a file's name, to the millisecond: two runs may start within a second."""
    nanoseconds = time.time_ns()
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(nanoseconds // 10**9))}-{nanoseconds // 10**6 % 1000:03d}"


def keep_private() -> None:
    """Makes all that this process and its children create from now on readable by this user alone."""
    os.umask(0o077)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a reader finds the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def write_private(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step, readable by this user only; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


# ---------------------------------------------------------------- changes

_SETTLED_NS = 3_000_000_000  # after a write, until the next one is sure to get another time: FAT counts in 2 s

FileState = tuple[
    tuple[str, int, int, int, int], ...
]  # per file: name, size, times of change (ns) of bytes and entry, inode


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a file or folder at one moment."""

    digest: str
    """SHA-256 of all bytes; of a folder, of its files' names and digests. Empty: nothing was there."""
    state: FileState
    """By which a change is noticed without reading."""
    settled: bool
    """Whether every later write changes the state. A file that was written moments ago may be written once more within the
    resolution of its times."""


def content_of(path: Path, known: Content | None = None) -> Content:
    """Returns the content of a file, or of a folder with all that is below it.

    Reads nothing if the state is that of `known`: sizes, times and inodes are the same. Times alone would not do: rsync, tar
    and cp keep a file's time of modification. Leaves out hidden files and what the library `datasets` computes from a saved
    set (cache-*). Raises OSError if a file cannot be read.
    """
    state = state_of(path)
    if known is not None and known.settled and known.state == state:
        return known
    settled = is_settled(state)
    if not path.is_dir():
        return Content(_sha256(path) if state else "", state, settled)
    total = hashlib.sha256()
    for name, *_ in state:
        total.update(f"{name}\0{_sha256(path / name)}\n".encode())
    return Content(total.hexdigest(), state, settled)


def state_of(path: Path) -> FileState:
    """Returns what changes when a file, or any file below a folder, is written, replaced, renamed or added; (): nothing is there."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found = []
    for file in files:
        name = str(file.relative_to(path))
        if file == path or not file.name.startswith((".", "cache-")):
            stat = file.stat()
            found.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(found)


def is_settled(state: FileState) -> bool:
    """Returns whether the next write to any of the files is sure to change the state."""
    return max((max(times) for _, _, *times, _ in state), default=0) < time.time_ns() - _SETTLED_NS


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
