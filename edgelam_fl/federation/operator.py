"""The operator's folder: what lets a person submit, list and stop runs at one server, with `flwr` or with `edgelam`.

It holds the token that the server asks for, keys for talking to a model over the hosts, and Flower's own settings for its command: `export FLWR_HOME=<folder>` is all that
`flwr` needs. Knows the two files in which Flower's command looks; knows no run.
"""

from __future__ import annotations

import base64
import json
import secrets
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import write_private
from edgelam_fl.trust.identity import Identity, has_identity, save_identity

CONNECTION = "edgelam"
"""The name of the server in Flower's settings; the default there, so that it need not be given."""
_TOKEN, _IDENTITY, _RUNS = "token", "identity", "runs"
_SETTINGS, _CREDENTIALS = "config.toml", "credentials.yaml"  # Flower's names


def operator_folder(state: Path) -> Path:
    """Returns where a server with this state folder keeps its operator's folder."""
    return state / "operator"


def prepare_operator(folder: Path, server: str, identity: Identity | None = None, runs: Path = Path("/")) -> None:
    """Makes the operator's folder for the server at HOST:PORT, or renews all but the token in it.

    identity: with which the operator talks to a model over the federation's hosts, and whose authority the server is
    recognised by; None: the server speaks plain text. runs: the folder below which the server lets runs have their folders.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / _TOKEN).exists():
        write_private(folder / _TOKEN, secrets.token_urlsafe(32))
    write_private(folder / _RUNS, str(runs.absolute()))
    shutil.rmtree(folder / _IDENTITY, ignore_errors=True)
    if identity is not None:
        save_identity(identity, folder / _IDENTITY)
    Operator(server, folder).write_settings(folder)


def read_token(folder: Path) -> str:
    """Reads the token. Raises EnvironmentProblem if the folder is no operator's or belongs to somebody else."""
    try:
        return (folder / _TOKEN).read_text(encoding="ascii").strip()
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder} is not the operator's folder of a server ({error.strerror}): `edgelam server` prints the folder at its "
            "start. Name it with --operator DIR; from another machine, name a copy"
        ) from error


def address_in(folder: Path) -> str:
    """Returns HOST:PORT of the server as it wrote it into its operator's folder. Raises EnvironmentProblem if it does not say."""
    try:
        settings = tomllib.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        return str(settings["superlink"][CONNECTION]["address"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EnvironmentProblem(
            f"{folder / _SETTINGS} does not say where the server is; give --server HOST:PORT"
        ) from error


@dataclass(frozen=True)
class Operator:
    """What a command needs to submit runs at one server."""

    server: str
    """HOST:PORT of the SuperLink."""
    folder: Path
    """The operator's folder."""

    def flower_home(self) -> Path:
        """Returns a folder of settings with which Flower's command reaches the server.

        That is the operator's folder itself, or, for another address than the server wrote there, a folder within. Raises
        EnvironmentProblem if the folder is no operator's.
        """
        read_token(self.folder)
        settings = self.folder / _SETTINGS
        if settings.exists() and settings.read_text(encoding="utf-8") == self._settings():
            return self.folder
        other = self.folder / "at" / self.server.replace(":", "_")
        self.write_settings(other)
        return other

    @property
    def identity(self) -> Path | None:
        """Returns the folder of the operator's keys; None: the server speaks plain text."""
        folder = self.folder / _IDENTITY
        return folder if has_identity(folder) else None

    def runs(self) -> Path:
        """Returns the folder below which the server lets runs have their folders, on its machine."""
        try:
            return Path((self.folder / _RUNS).read_text(encoding="utf-8"))
        except OSError:  # made by an older version
            return Path("/")

    def write_settings(self, home: Path) -> None:
        """Writes the two files of Flower's command to a folder: where the server is, and the token for it."""
        write_private(home / _SETTINGS, self._settings())
        keys = {"authn-type": "oidc", "oidc-access-token": read_token(self.folder), "oidc-refresh-token": "none"}
        lines = [
            f'"flower.account-auth.{self.server}.{key}": {base64.b64encode(value.encode()).decode()}\n'
            for key, value in keys.items()
        ]
        write_private(home / _CREDENTIALS, "".join(lines))

    def _settings(self) -> str:
        trusted = "insecure = true"
        if self.identity is not None:
            trusted = f"root-certificates = {json.dumps(str(self.identity.absolute() / 'authority.pem'))}"
        return (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f"[superlink.{CONNECTION}]\naddress = {json.dumps(self.server)}\n{trusted}\n"
        )
