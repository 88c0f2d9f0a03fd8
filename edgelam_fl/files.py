"""Files of this machine: the cache folder, atomic writes, private files. Knows nothing about their contents."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cache_folder() -> Path:
    """Returns the user's cache folder for models and what is made of them: EDGELAM_CACHE, or the system's place."""
    root = os.environ.get("EDGELAM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "edgelam-fl"
    )
    return Path(root)


def from_home(text: str) -> str:
    """Returns a text with this user's home folder written as ~, for what people share: its path names the user."""
    home = str(Path.home())
    return text if home == "/" else re.sub(rf"{re.escape(home)}(?=/|$|[^\w.-])", "~", text)


def keep_private() -> None:
    """Makes all that this process and its children create from now on readable by this user alone."""
    os.umask(0o077)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step: a reader finds the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def write_private(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step, readable by this user only; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
