"""Files of this machine: the cache folder, atomic writes, private files, changes. Knows nothing about what files mean."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

_ASIDE = ".old.part"
# Half-done files and folders: ours, those of the library safetensors, and of `write_atomically`.
_LEFTOVER = re.compile(r".*\.part|\.tmp.*|\..+\.\d+\.\d+")
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


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


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replaces a file in one step: a reader finds the old content or the new one, never a part.

    durable: its bytes are on the disk before it has the name, so that a power cut leaves the old content or the new one;
    `sync_folder` of its folder brings the name there.
    """
    _replace(path, content, 0o666, durable)


def write_private(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Replaces a file in one step, readable by this user only; makes its folder. durable: as of `write_atomically`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content, 0o600, durable)


def _replace(path: Path, content: str | bytes, mode: int, durable: bool) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk others need its bytes
        raise


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk: files that were made, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, place: Path) -> None:
    """Puts the folder `new` at `place`, whatever is there, and removes what was.

    In one step if the system can exchange two names (Linux, on most file systems). Else `place` is missing for a moment, and
    after a crash in that moment `sweep` of the folder around it puts the old one back.
    """
    sync_folder(new)
    if not place.exists():
        new.rename(place)
    elif _exchange(new, place):
        shutil.rmtree(new)
    else:
        aside = place.with_name(f"{place.name}{_ASIDE}")
        place.rename(aside)
        new.rename(place)
        shutil.rmtree(aside)
    sync_folder(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; returns whether the system could."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_HERE, os.fsencode(one.absolute()), _HERE, os.fsencode(other.absolute()), _EXCHANGE) == 0


def share(folder: Path, mode: int | None = None) -> None:
    """Gives all that is below a folder the folder's own mode, files without the right to execute: it is made to be handed on.

    mode: first given to the folder itself; None: it keeps its own, which is what this process's umask says of a new one.
    """
    if mode is not None:
        folder.chmod(mode)
    own = folder.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        path.chmod(own if path.is_dir() else own & 0o666)


def sweep(folder: Path) -> list[str]:
    """Removes from a folder what a killed process left half-done there, and says the names; does not look into its folders.

    To be called by the folder's only writer.
    """
    if not folder.is_dir():
        return []
    for aside in folder.glob(f"*{_ASIDE}"):
        place = aside.with_name(aside.name.removesuffix(_ASIDE))
        if not place.exists():
            aside.rename(place)
    found = [path for path in folder.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return sorted(path.name for path in found)


def is_full(error: OSError) -> bool:
    """Returns whether an error says that the disk, or this user's part of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line at once; `stream`: None: standard output. Output may be a log on a full disk, and that fails nobody."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


class RoomyStream:
    """An output stream that drops what a full disk does not take: commands that run for months write to logs on disks, too.

    All else, the stream's other errors included, is that of the stream.
    """

    def __init__(self, stream: Callable[[], TextIO]) -> None:
        """`stream`: returns it at each use, as `sys.stdout` may be another one by then."""
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text, or drops it; returns its length."""
        with _if_there_is_room():
            self._stream().write(text)
        return len(text)

    def flush(self) -> None:
        with _if_there_is_room():
            self._stream().flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


@contextmanager
def _if_there_is_room() -> Iterator[None]:
    """Ends the block quietly at a full disk."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise


def free_bytes(folder: Path) -> int:
    """Returns the bytes that this user may still write on the disk of a folder."""
    return shutil.disk_usage(folder).free


# ---------------------------------------------------------------- who writes in a folder

_LOCK, _LOCK_POLL_S = ".lock", 0.05


class Hold:
    """Holds a folder for this process alone, as long as the process lives: the kernel lets go when it ends, however it ends."""

    def __init__(self, folder: Path, patience_s: float = 0.0, lock: str = _LOCK) -> None:
        """Makes the folder, if need be. `lock`: name of the file in it that is locked, for processes of several kinds.

        Raises BlockingIOError if another process still holds the folder after `patience_s`; `holder_of` says which.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file, end = os.open(folder / lock, os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._sign()
            except BlockingIOError:
                if time.monotonic() >= end:
                    os.close(self._file)
                    raise
                time.sleep(_LOCK_POLL_S)

    def _sign(self) -> None:
        """Writes this process's number into the file, if the disk takes it."""
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.write(self._file, b"%d" % os.getpid())

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets another process hold the folder."""
        os.close(self._file)


def holder_of(folder: Path, lock: str = _LOCK) -> str:
    """Returns the number of the process that holds a folder, for messages; "?" if it could not write it."""
    number = (folder / lock).read_text(encoding="ascii", errors="replace")
    return number if number.isdigit() else "?"


def is_held(folder: Path, lock: str = _LOCK) -> bool | None:
    """Returns whether a process of this machine holds the folder; None if none ever did, or if that cannot be seen. lock: as of `Hold`."""
    try:
        file = os.open(folder / lock, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(file)
    return False


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
