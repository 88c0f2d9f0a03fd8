"""Uploads a run's result to a model hub: an exported folder, as a repository of its own. Nothing else of a run leaves the machine.

The protocol and the token are those of the library huggingface_hub.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelam_fl.errors import ConfigError, EdgelamError, EnvironmentProblem
from edgelam_fl.files import write_atomically
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import Result
from edgelam_fl.telemetry.human import human_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONFIG = "adapter_config.json"
_WORDS = 200  # characters of what a hub or the library says


@dataclass(frozen=True)
class Upload:
    """An upload: what it is made of, and the repository that it goes to."""

    name: str
    """Of the repository: OWNER/NAME, or NAME alone for the token's owner."""
    kind: str
    """As `edgelam export --to`."""
    public: bool
    dtype: str = ""
    front: Path | None = None
    endpoint: str | None = None
    """Address of the hub; None: HF_ENDPOINT, or huggingface.co."""


def push(result: Result, upload: Upload, tell: Callable[[str], None]) -> str:
    """Exports the result into a folder that is removed afterwards, and uploads it; returns the repository's address.

    tell: hears which files go where, before the first of them leaves. A new repository is private unless `upload.public`. Raises
    ConfigError for a wrong name, a missing or refused token, or a repository that anybody can read where a private one is wanted,
    EnvironmentProblem if the hub cannot be reached; as `export` otherwise.
    """
    from huggingface_hub import HfApi, get_token

    _check_name(upload.name)
    token = get_token()
    if not token:
        raise ConfigError("no token of the model hub is here: `hf auth login` keeps one, or set HF_TOKEN to it")
    api = HfApi(endpoint=upload.endpoint, token=token)
    with _explained(upload.name):
        if "/" not in upload.name:
            upload = replace(upload, name=f"{api.whoami()['name']}/{upload.name}")
        _check_is_private(api, upload)
    with tempfile.TemporaryDirectory(prefix=".push.", dir=result.folder) as made:
        folder, _ = export(result, upload.kind, Path(made) / upload.kind, upload.dtype, upload.front)
        _name_no_path(folder / _CONFIG)
        for line in _listed(folder, upload):
            tell(line)
        with _explained(upload.name):
            place = api.create_repo(upload.name, private=not upload.public, exist_ok=True)
            api.upload_folder(
                repo_id=place.repo_id,
                folder_path=folder,
                commit_message=f"Upload a result of EdgeLAM-FL ({upload.kind})",
            )
    return str(place)


def _check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"{name!r} is no name of a repository, which is OWNER/NAME: {str(error).splitlines()[0]}"
        ) from error


def _check_is_private(api: HfApi, upload: Upload) -> None:
    """Raises ConfigError if the repository exists, anybody can read it, and that was not asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(upload.name)
    except RepositoryNotFoundError:
        return
    if not found.private and not upload.public:
        raise ConfigError(
            f"{upload.name} exists, and anybody can read it. --public says that this is wanted; another NAME makes a private one"
        )


def _name_no_path(config: Path) -> None:
    """Takes the folders out of a base model's path in adapter_config.json: they name this machine's user."""
    if not config.is_file():
        return
    told = json.loads(config.read_text(encoding="utf-8"))
    base = told["base_model_name_or_path"]
    if os.path.isabs(base):
        told["base_model_name_or_path"] = Path(base).name
        write_atomically(config, json.dumps(told, indent=2) + "\n")


def _listed(folder: Path, upload: Upload) -> Iterator[str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    total = human_bytes(sum(file.stat().st_size for file in files))
    kind = "public" if upload.public else "private"
    yield f"uploading to {upload.name} ({kind}), {len(files)} files, {total}:"
    for file in files:
        yield f"  {file.relative_to(folder)}, {human_bytes(file.stat().st_size)}"
    yield "no data, no events and no names of nodes are among them"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns the errors of the hub and of the way there into messages."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except EdgelamError:
        raise
    except OfflineModeIsEnabled as error:
        raise EnvironmentProblem("HF_HUB_OFFLINE is set, so nothing is uploaded; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise ConfigError(
                f"the hub refuses the token for {name} ({status}): it must be one that may write there. `hf auth login` keeps another"
            ) from error
        raise EnvironmentProblem(f"the hub did not take {name}: {_short(error)}") from error
    except (
        Exception
    ) as error:  # of the library and of the one that it speaks HTTP with, which changes with its versions
        raise EnvironmentProblem(f"the hub cannot be used for {name}: {_short(error.__cause__ or error)}") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:_WORDS]
