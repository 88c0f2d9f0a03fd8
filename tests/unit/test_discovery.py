"""`--server auto`: the server announces itself on the network, and its nodes find it there by its authority."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation import discovery
from edgelam_fl.federation.discovery import FoundServer, announced, announced_addresses, find_server, servers
from edgelam_fl.federation.join import find_waiting
from edgelam_fl.federation.standing import NodeOptions, find_standing
from edgelam_fl.trust.invites import Invitation

OURS, OTHERS = "a" * 64, "b" * 64
LOOPBACK = ["127.0.0.1"]
INVITE = Invitation("10.0.0.1:8000", "host", "desk", "t" * 22, OURS)


def found(monkeypatch: pytest.MonkeyPatch, *these: FoundServer) -> None:
    monkeypatch.setattr(discovery, "servers", lambda authority, look_s, interfaces: list(these))


def nobody(address: str, tls: bool) -> bool:
    return False


def test_a_server_is_found_where_it_announces_itself() -> None:
    with announced(8123, ["192.0.2.7"], OURS, LOOPBACK):
        assert servers(OURS, 30.0, LOOPBACK) == [FoundServer(("192.0.2.7:8123",), OURS)]


def test_only_the_one_of_the_own_federation_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, FoundServer(("10.0.0.8:8000",), OTHERS), FoundServer(("10.0.0.9:8000",), OURS))
    assert find_server(OURS, answers=nobody) == "10.0.0.9:8000"
    with pytest.raises(ConfigError, match=r"several servers announce themselves \(10.0.0.8:8000, 10.0.0.9:8000\)"):
        find_server(answers=nobody)
    found(monkeypatch, FoundServer(("10.0.0.8:8000",), OTHERS))
    with pytest.raises(EnvironmentProblem, match=r"no server of this node's federation .* --server HOST:PORT"):
        find_server(OURS, answers=nobody)
    assert find_server(answers=nobody) == "10.0.0.8:8000"


def test_of_several_addresses_it_takes_the_one_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with containers announces the addresses of their bridges too."""
    found(monkeypatch, FoundServer(("172.17.0.1:8000", "10.0.0.9:8000"), OURS))
    asked: list[tuple[str, bool]] = []

    def answers(address: str, tls: bool) -> bool:
        asked.append((address, tls))
        return address.startswith("10.")

    assert find_server(OURS, answers=answers) == "10.0.0.9:8000"
    assert asked == [("172.17.0.1:8000", True), ("10.0.0.9:8000", True)]
    assert find_server(OURS, answers=nobody) == "172.17.0.1:8000", "whoever dials there hears what is wrong"


def test_what_only_this_machine_reaches_is_not_announced() -> None:
    known = ["10.0.0.1", "127.0.0.1", "::1", "fe80::1", "raspberrypi", "10.0.0.1", "2001:db8::5"]
    assert announced_addresses(known) == ["10.0.0.1", "2001:db8::5"]


# ---------------------------------------------------------------- a node


def test_a_node_that_looks_for_its_server_looks_again_at_later_starts(tmp_path: Path) -> None:
    standing = find_standing(NodeOptions(server="auto"), INVITE.text, "", None, False, tmp_path)
    assert (standing.options.server, standing.authority) == ("auto", OURS)
    there = standing.at("10.0.0.9:8000")
    assert (there.options.server, there.invitation.server) == ("10.0.0.9:8000", "10.0.0.9:8000")
    assert json.loads(there.kept_options())["server"] == "auto"
    typed = find_standing(NodeOptions(server="10.0.0.5:8000"), INVITE.text, "", None, False, tmp_path)
    assert json.loads(typed.kept_options())["server"] == "10.0.0.5:8000"


def test_a_node_waits_for_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    standing = find_standing(NodeOptions(server="auto"), INVITE.text, "", None, False, tmp_path)
    told = io.StringIO()
    answers: Iterator[str] = iter(["", "", "10.0.0.9:8000"])
    pauses: list[float] = []

    def find(authority: str) -> str:
        assert authority == OURS
        if address := next(answers):
            return address
        raise EnvironmentProblem("no server announces itself")

    there = find_waiting(Console(file=told, width=200), standing, True, find, pauses.append)
    assert there.options.server == "10.0.0.9:8000"
    assert (told.getvalue().count("no server announces itself"), pauses) == (1, [1.0, 1.5])
    with pytest.raises(EnvironmentProblem):
        find_waiting(Console(file=told), standing, False, lambda authority: find_server(OURS, 0.0, LOOPBACK))
