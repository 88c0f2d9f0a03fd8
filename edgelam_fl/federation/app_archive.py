"""The Flower App as Flower ships it, an archive: by which digest a server and by which hash a node compares it with its own.

Knows the App's folders and the archive's format; builds nothing itself and imports nothing of Flower.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.federation.flower_app import app_folder

APP_PARTS = ("server", "clients", "strategies")
"""The App's folders, beside its pyproject.toml."""
_MAX_BYTES = 16 << 20
_CLIENTS = "clients/"
_MANIFEST = ".info/CONTENT"  # in Flower's archive of an App: a line per file with its SHA-256
_MOST_MANIFEST_BYTES = 1 << 20
_SHOWN = 12  # digits of a hash in a message


def app_alone(folder: Path) -> Path:
    """Returns a folder with the Flower App and nothing else: Flower looks at every file, and .venv has 30,000.

    An installed package has such a folder. The repository's files are copied to `folder`; an older copy there is replaced.
    """
    app = app_folder()
    if app.name == "_app":
        return app
    shutil.rmtree(folder, ignore_errors=True)
    for part in APP_PARTS:
        shutil.copytree(app / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(app / "pyproject.toml", folder)
    return folder


def run_config_keys() -> list[str]:
    """Returns the keys that a run config of the installed App may have, with their dots."""
    project = tomllib.loads((app_folder() / "pyproject.toml").read_text(encoding="utf-8"))
    return list(_with_dots(project["tool"]["flwr"]["app"]["config"]))


def _with_dots(table: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _with_dots(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def archive_digest(archive: bytes) -> str:
    """Returns a digest of the names and contents of an App's archive; archives that were compressed differently are equal.

    Raises ValueError for what is no such archive.
    """
    found, left = [], _MAX_BYTES
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            for info in files.infolist():
                with files.open(info) as file:
                    content = file.read(left + 1)
                left -= len(content)
                if left < 0:
                    raise ValueError(f"the App's files are longer than {_MAX_BYTES} bytes")
                found.append(f"{hashlib.sha256(content).hexdigest()} {info.filename}\n")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"the App's archive cannot be read: {error}") from error
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


# ---------------------------------------------------------------- on a node


@dataclass(frozen=True, slots=True)
class App:
    """A Flower App as nodes compare it."""

    name: str
    """PUBLISHER/NAME."""
    version: str
    clients: str
    """Hash of the files of its client part, as hexadecimal digits; "": the App has no client part."""


def installed_app() -> App:
    """Reads which App is installed on this machine."""
    folder = app_folder()
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    files = {file.relative_to(folder).as_posix(): file for file in (folder / _CLIENTS).rglob("*.py")}
    lines = [_manifest_line(name, file.read_bytes()) for name, file in files.items()]
    name = f"{project['tool']['flwr']['app']['publisher']}/{project['project']['name']}"
    return App(name, project["project"]["version"], _clients_hash(lines))


def archived_app(name: str, version: str, archive: bytes) -> App:
    """Reads the hash of the client part out of Flower's archive of an App. Of its files it reads the list alone.

    An archive that cannot be read counts as one without a client part.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files, files.open(_MANIFEST) as manifest:
            lines = manifest.read(_MOST_MANIFEST_BYTES).decode("utf-8", "replace").splitlines()
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, NotImplementedError, RuntimeError):
        lines = []
    return App(name, version, _clients_hash(lines))


def _manifest_line(name: str, content: bytes) -> str:
    return f"{name},{hashlib.sha256(content).hexdigest()},{8 * len(content)}"


def _clients_hash(lines: list[str]) -> str:
    """Returns the hash of the lines that name files of the client part; their order does not count."""
    clients = sorted(line for line in lines if line.startswith(_CLIENTS))
    return hashlib.sha256("\n".join(clients).encode()).hexdigest() if clients else ""


def why_refused(brought: App, own: App) -> str:
    """Returns why a node with the App `own` does not take part in a run that brings `brought`; "" if it does."""
    here = f"this node runs its own App, {own.name} {own.version}, and no other"
    if brought.name != own.name:
        return f"{here}; the run brings {brought.name!r:.80} {brought.version!r:.40} (hash {_shown(brought)})"
    if brought.clients != own.clients:
        return (
            f"{here}; the client part of the run's version {brought.version!r:.40} has the hash {_shown(brought)}, this "
            f"node's {_shown(own)}: install the server's version of edgelam-fl on this node and start it again"
        )
    return ""


def _shown(app: App) -> str:
    return app.clients[:_SHOWN] or "none: it has no client part"
