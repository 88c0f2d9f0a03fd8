"""Finds the Flower App (server/, clients/, strategies/) and imports its modules: the library's one door to them.

The App is what a SuperLink receives with a run, and no part of this package. This module knows none of its contents.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


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
