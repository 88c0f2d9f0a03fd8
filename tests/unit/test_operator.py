"""The operator's folder: its token, and Flower's settings for the server's address and for others."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.operator import Operator, prepare_operator, read_token
from edgelam_fl.names import CALLER
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, load_identity


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_token_stays_and_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "operator"
    prepare_operator(folder, "127.0.0.1:8000")
    token = read_token(folder)
    assert len(token) == 43, "32 random bytes"
    prepare_operator(folder, "127.0.0.1:9000")
    assert read_token(folder) == token
    assert '"127.0.0.1:9000"' in (folder / "config.toml").read_text()
    assert mode(folder) == 0o700
    assert {mode(file) for file in folder.iterdir()} == {0o600}
    identity = issue(Authority.open(tmp_path / "trust"), CALLER, DEVICE)
    prepare_operator(folder, "127.0.0.1:9000", identity)
    assert load_identity(folder / "identity") == identity
    assert f'root-certificates = "{folder}/identity/authority.pem"' in (folder / "config.toml").read_text()
    prepare_operator(folder, "127.0.0.1:9000")
    assert Operator("127.0.0.1:9000", folder).identity is None, "the server was started in plain text"
    assert "insecure = true" in (folder / "config.toml").read_text()
    prepare_operator(tmp_path / "another", "127.0.0.1:8000")
    assert read_token(tmp_path / "another") != token


def test_another_address_of_the_server_has_settings_of_its_own(tmp_path: Path) -> None:
    prepare_operator(tmp_path, "127.0.0.1:8000")
    assert Operator("127.0.0.1:8000", tmp_path).flower_home() == tmp_path
    other = Operator("192.0.2.1:8000", tmp_path).flower_home()
    assert other != tmp_path
    assert mode(other / "credentials.yaml") == 0o600
    token = base64.b64encode(read_token(tmp_path).encode()).decode()
    assert (
        f'"flower.account-auth.192.0.2.1:8000.oidc-access-token": {token}' in (other / "credentials.yaml").read_text()
    )
    assert '"127.0.0.1:8000"' in (tmp_path / "config.toml").read_text(), "the first address's stay"


def test_a_folder_without_a_token_is_no_operators(tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"is not the operator's folder of a server .* Name it with --operator DIR"
    ):
        Operator("127.0.0.1:8000", tmp_path / "nowhere").flower_home()
