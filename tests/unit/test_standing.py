"""As whom `edgelam client` starts: after a join without a word, and with one clear message where that cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.errors import ConfigError, EdgelamError, EnvironmentProblem, UsageError
from edgelam_fl.federation.join import lock_state
from edgelam_fl.federation.standing import NodeOptions, find_standing
from edgelam_fl.files import Hold
from edgelam_fl.node import daemon
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import save_identity
from edgelam_fl.trust.invites import Invitation, parse_invitation
from edgelam_fl.trust.server import open_trust, prepare_trust


@pytest.fixture
def states(tmp_path: Path) -> Path:
    return tmp_path / "states"


def invitation(role: str = "device", name: str = "ann") -> str:
    return Invitation("10.0.0.5:8000", role, name, "t" * 22, "0" * 64).text


def joined(states: Path, name: str, role: str = "device", options: dict | None = None) -> Path:
    """Leaves the files of a node that has joined."""
    save_identity(issue(Authority.open(states.parent / "trust"), name, role), states / name / "identity")
    kept = {
        "server": "10.0.0.5:8000",
        "data": "/data/ann.jsonl",
        "listen": "",
        "advertise": "",
        "threads": 2,
        "tags": ["a"],
    }
    (states / name / "options.json").write_text(json.dumps(kept | (options or {})))
    return states / name


def test_an_invitation_says_who_and_where(states: Path) -> None:
    options = NodeOptions(data=Path("a.jsonl"), threads=3)
    standing = find_standing(options, invitation(), "", None, False, states)
    assert standing.name == "ann"
    assert standing.state == states / "ann"
    assert standing.identity == states / "ann" / "identity"
    assert standing.options == NodeOptions("10.0.0.5:8000", Path("a.jsonl"), threads=3)
    assert standing.invitation == parse_invitation(invitation())
    other = find_standing(NodeOptions("edge:9", Path("a")), invitation(), "ann", Path("here"), False, states)
    assert (other.state, other.options.server) == (Path("here"), "edge:9")
    assert other.invitation is not None
    assert other.invitation.server == "edge:9"


def test_a_node_that_joined_starts_without_a_word(states: Path) -> None:
    joined(states, "ann")
    standing = find_standing(NodeOptions(), "", "", None, False, states)
    assert (standing.name, standing.invitation) == ("ann", None)
    assert standing.options == NodeOptions("10.0.0.5:8000", Path("/data/ann.jsonl"), threads=2, tags=["a"])
    once = find_standing(NodeOptions(data=Path("more.jsonl")), "", "ann", None, False, states)
    assert once.options.data == Path("more.jsonl")
    assert once.options.threads == 2


@pytest.mark.parametrize(
    ("options", "join_text", "name", "kind", "message"),
    [
        (NodeOptions(), "", "", EnvironmentProblem, r"has no keys.*below .*`edgelam invite NAME`.*--state"),
        (NodeOptions(), "", "ann", EnvironmentProblem, r"has no keys in .*ann.*edgelam invite"),
        (NodeOptions("10.0.0.5:8000"), "", "", EnvironmentProblem, r"has no keys.*edgelam invite"),
        (NodeOptions("127.0.0.1:8000"), "", "", EnvironmentProblem, r"has no keys.*edgelam invite"),
        (NodeOptions(), "edgelam1/x", "", ConfigError, r"no join text"),
        (
            NodeOptions(),
            invitation(),
            "",
            ConfigError,
            r"ann was invited as a device, so --data FILE is missing.*--role host",
        ),
        (NodeOptions(data=Path("a")), invitation("host"), "", ConfigError, r"invited as a host.*leave --data out"),
        (NodeOptions(data=Path("a")), invitation(), "ben", ConfigError, r"'ben' differs.*'ann'; leave --name out"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_sent(
    states: Path, options: NodeOptions, join_text: str, name: str, kind: type[EdgelamError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        find_standing(options, join_text, name, None, False, states)


def test_without_keys_everything_has_to_be_said(states: Path) -> None:
    plain = find_standing(NodeOptions("10.0.0.5:8000"), "", "ann", None, True, states)
    assert (plain.name, plain.identity, plain.state) == ("ann", None, states / "ann")
    with pytest.raises(ConfigError, match="--server HOST:PORT is missing"):
        find_standing(NodeOptions(), "", "ann", None, True, states)
    with pytest.raises(ConfigError, match="--name 'a b' may hold"):
        find_standing(NodeOptions("10.0.0.5:8000"), "", "a b", None, True, states)


def test_several_nodes_of_one_directory_are_told_apart_by_name(states: Path) -> None:
    joined(states, "ann")
    joined(states, "edge", "host", {"data": None})
    with pytest.raises(ConfigError, match=rf"\(ann, edge\); say which one with --state, as in --state {states}/ann"):
        find_standing(NodeOptions(), "", "", None, False, states)
    assert find_standing(NodeOptions(), "", "edge", None, False, states).name == "edge"
    with pytest.raises(ConfigError, match="holds the keys of 'ann'; leave --name out"):
        find_standing(NodeOptions(), "", "ben", states / "ann", False, states)


def test_an_evaluation_file_is_kept_with_the_other_options(states: Path) -> None:
    joined(states, "ann", options={"eval_data": "/data/new.jsonl"})
    assert find_standing(NodeOptions(), "", "", None, False, states).options.eval_data == Path("/data/new.jsonl")
    other = find_standing(NodeOptions(eval_data=Path("other.jsonl")), "", "", None, False, states)
    assert (other.options.eval_data, other.options.data) == (Path("other.jsonl"), Path("/data/ann.jsonl"))


def test_a_node_that_lost_its_key_or_its_options_is_told_so(states: Path) -> None:
    state = joined(states, "ann")
    (state / "options.json").write_text("{")
    with pytest.raises(EnvironmentProblem, match=r"options.json cannot be read.*--server and --data"):
        find_standing(NodeOptions(), "", "", None, False, states)
    (state / "options.json").unlink()
    with pytest.raises(ConfigError, match="--server HOST:PORT must be given"):
        find_standing(NodeOptions(), "", "", None, False, states)
    given = NodeOptions("127.0.0.1:1", Path("a"))
    assert find_standing(given, "", "", None, False, states).options == given
    (state / "identity" / "key.pem").unlink()
    with pytest.raises(EnvironmentProblem, match=r"key.pem cannot be read.*edgelam invite"):
        find_standing(given, "", "", None, False, states)


def edgelam(*arguments: object) -> int:
    return exit_code(app, "edgelam", [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("lock", "who"),
    [
        (lock_state, "another `edgelam client` (process number {})"),
        (partial(daemon.lock_state, patience_s=0.0), "the stage host with process number {}"),
    ],
)
def test_a_state_folder_is_one_nodes_at_a_time(lock: Callable[[Path], Hold], who: str, tmp_path: Path) -> None:
    state = tmp_path / "node"
    with lock(state), pytest.raises(EnvironmentProblem) as refused:
        lock(state)
    assert str(refused.value).startswith(f"{who.format(os.getpid())} uses the state folder {state}: end ")
    lock(state).release()


def test_invite_nodes_and_revoke_work_on_the_servers_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["invite", "ann"], ["nodes"], ["revoke", "ann"]):
        assert edgelam(*command, "--state", tmp_path) == EnvironmentProblem.exit_code
        assert "start it with `edgelam server`" in capsys.readouterr().err
    prepare_trust(tmp_path, "127.0.0.1", 1)
    assert edgelam("nodes", "--state", tmp_path) == 0
    assert "no node has joined yet; edgelam invite NAME" in capsys.readouterr().out

    assert edgelam("invite", "ann", "--expires", "30m", "--state", tmp_path) == 0
    line = capsys.readouterr().out.splitlines()[2]
    text = line.removeprefix("edgelam client --join ").removesuffix(" --data FILE")
    assert parse_invitation(text).fingerprint == open_trust(tmp_path).authority.fingerprint
    assert edgelam("invite", "ann", "--role", "host", "--json", "--state", tmp_path) == 0
    assert json.loads(capsys.readouterr().out)["role"] == "host"

    assert edgelam("revoke", "ann", "--state", tmp_path) == 0
    assert "the invite for ann is withdrawn" in capsys.readouterr().out

    trust = open_trust(tmp_path)
    trust.members.add(issue(trust.authority, "ann", "device"))
    assert edgelam("nodes", "--json", "--state", tmp_path) == 0
    (ann,) = json.loads(capsys.readouterr().out)
    assert (ann["name"], ann["role"], ann["revoked"]) == ("ann", "device", None)
    assert ann["until"] > ann["since"] == ann["seen"]

    assert edgelam("revoke", "ann", "--state", tmp_path) == 0
    assert "Flower forgets it when the server starts" in " ".join(capsys.readouterr().err.split())
    assert len(trust.members.revoked_serials()) == 1
    assert edgelam("nodes", "--state", tmp_path) == 0
    assert "revoked" in capsys.readouterr().out
    assert edgelam("revoke", "ann", "--state", tmp_path) == UsageError.exit_code
    assert edgelam("invite", "x", "--expires", "soon", "--state", tmp_path) == UsageError.exit_code
    assert "as in 30m, 1h or 7d" in capsys.readouterr().err
