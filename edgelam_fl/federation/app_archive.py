"""The Flower App as Flower ships it: an archive, and the digest by which two archives of the same App are equal.

Knows the App's folders and the archive's format; builds nothing itself and imports nothing of Flower.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
import zlib
from pathlib import Path

from edgelam_fl.federation.flower_app import app_folder

APP_PARTS = ("server", "clients", "strategies")
"""The App's folders, beside its pyproject.toml."""
_MAX_BYTES = 16 << 20


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
