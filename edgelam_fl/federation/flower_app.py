"""Finds the Flower App (server/, clients/, strategies/), imports its modules and says which App a run has brought.

The App is what a SuperLink receives with a run, and no part of this package. This module knows none of its contents: a node
runs the client part of its own installation, and compares what a run brings by name and by hash.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType

_CLIENTS = "clients/"
_MANIFEST = ".info/CONTENT"  # in Flower's archive of an App: a line per file with its SHA-256
_MOST_MANIFEST_BYTES = 1 << 20
_SHOWN = 12  # digits of a hash in a message


def app_folder() -> Path:
    """Returns the folder of the Flower App: the repository itself, or its copy inside an installed package."""
    package = Path(__file__).parents[1]
    return package / "_app" if (package / "_app").is_dir() else package.parent


def app_module(name: str) -> ModuleType:
    """Imports a module of the App by its full name, such as `server.checks`."""
    folder = str(app_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


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
        with zipfile.ZipFile(BytesIO(archive)) as files, files.open(_MANIFEST) as manifest:
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
