"""Finds the file of a data set that --data names by its hub name or by a part of it. Knows nothing of what is in it.

    hf:NAME[/CONFIG][:SPLIT]     a data set of the Hugging Face hub, as the library `datasets` loads it; hf:FOLDER[:SPLIT] one on this machine
    FOLDER:PART                  a part of what `datasets` saved as several sets

A named data set becomes one Parquet file in the cache, which is read as any other. Code of a data set is never run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from edgelam_fl.errors import DataError, EnvironmentProblem
from edgelam_fl.files import cache_folder
from edgelam_fl.names import printable

_HUB = re.compile(r"hf:(?:/{1,2}datasets/)?(?P<name>.+?)(?::(?P<split>\w[\w.-]*(?:\[[^\]]*\])?))?")
_DEFAULT_SPLIT = "train"


def local_data(data: Path) -> Path:
    """Returns the file or folder that --data names, after loading a data set that is named by its hub name.

    Raises DataError for a name without data, EnvironmentProblem without the library `datasets` or if the hub does not answer.
    """
    text = str(data)
    if os.path.lexists(data):
        return data
    if found := _HUB.fullmatch(text):
        return _loaded(text, found["name"], found["split"] or _DEFAULT_SPLIT)
    if re.match(r"[a-z]+:/", text):
        raise DataError(
            f"{text} is an address, and data are files of this machine: fetch it first (curl -O), and give the file",
            "missing-file",
        )
    folder, colon, part = text.rpartition(":")
    if colon and part and Path(folder).is_dir():
        if not (Path(folder) / part).is_dir():
            parts = sorted(inner.name for inner in Path(folder).iterdir() if inner.is_dir())
            raise DataError(
                f"{folder} has no part {part!r}, but {', '.join(parts) or 'none'}; a folder of files as on a hub is read by its name, "
                f"hf:{folder}:{part}",
                "missing-file",
            )
        return Path(folder) / part
    return data


def _loaded(text: str, name: str, split: str) -> Path:
    """Loads a data set as `datasets` does, and returns it as a Parquet file in the cache."""
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem(
            f"{text} needs the library datasets, which is not installed: pip install 'edgelam-fl[datasets]'",
            "its data need the library datasets, which is not installed",
        ) from error
    path, config = (name, None) if Path(name).is_dir() else _hub_name(text, name)
    try:
        found = datasets.load_dataset(path, config, split=split)
    except (ConnectionError, TimeoutError) as error:
        raise EnvironmentProblem(
            f"{text}: {printable(str(error), 200)}. Nothing of it is in the cache on this machine, and the hub does not answer "
            f"(with --offline and HF_HUB_OFFLINE nobody asks it); load it once where there is a network, or give a file",
            "its data set is not in the cache, and the hub does not answer",
        ) from error
    except Exception as error:
        raise DataError(f"{text} cannot be loaded: {printable(str(error), 300)}", "missing-file") from error
    return _as_file(text, found)


def _hub_name(text: str, name: str) -> tuple[str, str | None]:
    """Splits OWNER/NAME/CONFIG; a name of one word is one of the hub's oldest data sets."""
    if name.startswith((".", "/", "~")):
        raise DataError(f"{text}: there is no folder {name}", "missing-file")
    words = name.split("/")
    if len(words) > 3 or not all(words):
        raise DataError(
            f"{text} must be hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:FOLDER, each with :SPLIT or without",
            "missing-file",
        )
    return "/".join(words[:2]), words[2] if len(words) == 3 else None


def _as_file(text: str, found: Any) -> Path:
    folder = cache_folder() / "data"
    label = re.sub(r"[^A-Za-z0-9.-]+", "-", text.removeprefix("hf:")).strip("-.")[-80:]
    file = folder / f"{label}-{found._fingerprint}.parquet"
    if file.exists():
        return file
    part = folder / f".{file.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found.to_parquet(str(part))
        part.chmod(0o600)
        part.replace(file)
    except Exception as error:
        part.unlink(missing_ok=True)
        raise EnvironmentProblem(f"{text} cannot be written to {folder}: {printable(str(error), 200)}") from error
    return file
