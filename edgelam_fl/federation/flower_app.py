"""The Flower App (server/, clients/, strategies/): finds its folder and is the one door to its modules.

The App is what a SuperLink is handed, not a part of this package; the library reaches its checks and its arithmetic here.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def app_folder() -> Path:
    """Finds the Flower App: the repository itself, or its copy inside an installed package."""
    package = Path(__file__).parents[1]
    return package / "_app" if (package / "_app").is_dir() else package.parent


def app_module(name: str) -> ModuleType:
    """Imports a module of the App by its full name, such as `server.checks`."""
    folder = str(app_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def preload_clientapp(folder: str) -> None:
    """Imports what the ClientApp imports. Its own module comes with each run, and must not be here already."""
    sys.path.insert(0, folder)
    importlib.import_module("clients.app")
    sys.path.remove(folder)
    for name in ("clients.app", "clients"):
        del sys.modules[name]
