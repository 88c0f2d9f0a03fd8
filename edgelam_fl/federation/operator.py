"""The operator's folder: what lets a person submit, list and stop runs at one server, with `flwr` or with `edgelam`.

It holds the token that the server asks for, and Flower's own settings for its command: `export FLWR_HOME=<folder>` is all that
`flwr` needs. Knows the two files in which Flower's command looks; knows no run.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import write_private

CONNECTION = "edgelam"
"""The name of the server in Flower's settings; the default there, so that it need not be given."""
_TOKEN, _AUTHORITY = "token", "authority.pem"
_SETTINGS, _CREDENTIALS = "config.toml", "credentials.yaml"  # Flower's names


def operator_folder(state: Path) -> Path:
    """Returns where a server with this state folder keeps its operator's folder."""
    return state / "operator"


def prepare_operator(folder: Path, server: str, authority: bytes = b"") -> None:
    """Makes the operator's folder for the server at HOST:PORT, or renews Flower's settings there. The token stays.

    authority: the certificate (PEM) by which the server is recognised; empty: it speaks plain text.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / _TOKEN).exists():
        write_private(folder / _TOKEN, secrets.token_urlsafe(32))
    if authority:
        write_private(folder / _AUTHORITY, authority)
    else:
        (folder / _AUTHORITY).unlink(missing_ok=True)
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
    def has_authority(self) -> bool:
        """Whether the server speaks TLS, so that it may be anywhere."""
        return (self.folder / _AUTHORITY).exists()

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
        authority = json.dumps(str((self.folder / _AUTHORITY).absolute()))
        trusted = f"root-certificates = {authority}" if self.has_authority else "insecure = true"
        return (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f"[superlink.{CONNECTION}]\naddress = {json.dumps(self.server)}\n{trusted}\n"
        )
