"""Joining over real TLS on loopback: one token lets one node in, once; every refusal says what is wrong and what to do."""

from __future__ import annotations

import http.server
import json
import secrets
import shutil
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import ConfigError, EdgelamError, EnvironmentProblem, PeerLost, Refused
from edgelam_fl.federation.join import Renewals
from edgelam_fl.federation.standing import NodeOptions, Standing, find_standing
from edgelam_fl.trust.authority import NODE_VALID, issue
from edgelam_fl.trust.identity import (
    Identity,
    load_identity,
    load_key,
    new_key,
    peer_of,
    public_key,
    save_identity,
    valid_until,
)
from edgelam_fl.trust.invites import Invitation, parse_duration_s, parse_invitation
from edgelam_fl.trust.join import clock_words, has_joined, join, renew, sync
from edgelam_fl.trust.join_service import ROUTE, JoinService
from edgelam_fl.trust.members import MEMBERS_FILE, Members
from edgelam_fl.trust.server import ServerTrust, open_trust, prepare_trust
from edgelam_fl.trust.signed import sign_request
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.secure import Security
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Link
from tests.links import hello, make_terms, ready, terms
from tests.support import WAIT_S

DAY_S = 86400.0
Answerer = Callable[[Mapping[str, Any]], tuple[int, dict[str, Any]]]


@dataclass
class Flower:
    """What the SuperLink knows: keys by node number."""

    keys: dict[int, str] = field(default_factory=dict)

    def register(self, key: str, name: str) -> int:
        number = next((number for number, known in self.keys.items() if known == key), secrets.randbits(64))
        self.keys[number] = key
        return number

    def unregister(self, number: int) -> None:
        self.keys.pop(number, None)


@dataclass(eq=False)
class Federation:
    """A server that lets nodes in, listening on loopback, with a clock that tests set."""

    trust: ServerTrust
    folder: Path
    flower: Flower
    port: int
    ahead_s: float = 0.0

    def now(self) -> float:
        return time.time() + self.ahead_s

    @property
    def members(self) -> Members:
        return self.trust.members

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def invite(self, name: str = "ann", role: str = "device", valid_s: float = 3600.0) -> Invitation:
        token = self.members.invite(name, role, valid_s)
        return Invitation(f"127.0.0.1:{self.port}", role, name, token, self.trust.authority.fingerprint)


class Quiet(http.server.ThreadingHTTPServer):
    """A server that does not print what clients do wrong."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def listening(folder: Path, addresses: tuple[str, ...] = (), host: str = "127.0.0.1") -> Iterator[Federation]:
    trust = prepare_trust(folder, host, 1, addresses)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trust.identity / "certificate.pem", trust.identity / "key.pem")
    flower = Flower()
    handlers: dict[str, Answerer] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = handlers[self.path.removeprefix(ROUTE)](request)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )  # by the thread of the connection
    federation = Federation(trust, folder, flower, server.server_address[1])
    federation.trust = replace(trust, members=Members(folder / "trust", federation.now))
    service = JoinService(trust.authority, federation.members, flower.register, flower.unregister, federation.now)
    handlers.update(service.handlers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield federation
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    yield from listening(tmp_path / "server")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Federation]:
    yield from listening(tmp_path / "elsewhere")


def test_an_invited_node_has_its_key_signed_and_is_known_to_flower(federation: Federation, tmp_path: Path) -> None:
    folder = tmp_path / "ann" / "identity"
    invitation = parse_invitation(federation.invite(role="host").text)
    joined = join(invitation, folder)
    assert joined.identity == load_identity(folder)
    assert (joined.identity.name, joined.identity.role) == ("ann", "host")
    assert abs(joined.ahead_s) < 60
    member = federation.members.find("ann")
    assert member.public_key == public_key(joined.identity.key)
    assert list(federation.flower.keys) == [member.flower_id]
    assert has_joined(invitation, folder)
    assert not has_joined(federation.invite("ben"), folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_s17_a_name_belongs_to_a_key(federation: Federation, tmp_path: Path) -> None:
    join(federation.invite(), tmp_path / "ann")
    for name in ("ann", "ANN"):
        with pytest.raises(ConfigError, match=r"ann is a member already.*edgelam revoke ann"):
            federation.invite(name)
    with pytest.raises(ConfigError, match="ann is a member already"):
        federation.members.add(issue(federation.trust.authority, "ann", "device"))
    other = new_key()
    status, answer = ask(federation, "renew", sign_request({"purpose": "renew", "name": "ann"}, other))
    assert status == 403
    assert "not signed by the key" in answer["detail"]


def ask(federation: Federation, handler: str, request: dict) -> tuple[int, dict]:
    flower = federation.flower
    service = JoinService(
        federation.trust.authority, federation.members, flower.register, flower.unregister, federation.now
    )
    return service.handlers[handler](request)


# ---------------------------------------------------------------- bad input: one body for all

Attempt = Callable[[], object]


@dataclass
class Scene:
    """A federation, another one, and the folder of the node that tries."""

    here: Federation
    elsewhere: Federation
    node: Path

    def join(self, invitation: Invitation, clock: Callable[[], float] = time.time) -> Attempt:
        return lambda: join(invitation, self.node, clock)

    def renew(self, server: Federation) -> Attempt:
        return lambda: renew(f"127.0.0.1:{server.port}", self.node)


def used(scene: Scene) -> Attempt:
    invitation = scene.here.invite()
    join(invitation, scene.node.with_name("first"))
    return scene.join(invitation)


def expired(scene: Scene) -> Attempt:
    invitation = scene.here.invite(valid_s=3600.0)
    scene.here.ahead_s += 3601.0
    return scene.join(invitation)


def withdrawn(scene: Scene) -> Attempt:
    invitation = scene.here.invite()
    scene.here.members.revoke("ann")
    return scene.join(invitation)


def replaced(scene: Scene) -> Attempt:
    invitation = scene.here.invite()
    scene.here.invite()
    return scene.join(invitation)


def of_another_federation(scene: Scene) -> Attempt:
    return scene.join(replace(scene.here.invite(), token=scene.elsewhere.invite().token))


def of_another_name(scene: Scene) -> Attempt:
    return scene.join(replace(scene.here.invite(), name="ben"))


def name_in_use(scene: Scene) -> Attempt:
    invitation = scene.here.invite()
    scene.here.members.add(issue(scene.here.trust.authority, "ann", "device"))
    return scene.join(invitation)


def of_a_member_since_revoked(scene: Scene) -> Attempt:
    attempt = used(scene)
    scene.here.members.revoke("ann")
    return attempt


def fingerprint_that_does_not_match(scene: Scene) -> Attempt:
    return scene.join(replace(scene.here.invite(), fingerprint=scene.elsewhere.trust.authority.fingerprint))


def second_authority_behind_the_right_one(scene: Scene) -> Attempt:
    """Somebody on the way adds an authority of his own to the server's, whose fingerprint is right."""
    there = scene.elsewhere.trust.authority
    there.certificate = scene.here.trust.authority.certificate + there.certificate
    return scene.join(replace(scene.here.invite(), server=f"127.0.0.1:{scene.elsewhere.port}"))


def server_address_not_in_its_certificate(scene: Scene) -> Attempt:
    return scene.join(replace(scene.here.invite(), server=f"127.1:{scene.here.port}"))


def nobody_listens(scene: Scene) -> Attempt:
    return scene.join(replace(scene.here.invite(), server="127.0.0.1:1"))


def clock_years_ahead(scene: Scene) -> Attempt:
    return scene.join(scene.here.invite(), lambda: time.time() + 2 * 365 * DAY_S)


def certificate_of_another_federation(scene: Scene) -> Attempt:
    join(scene.elsewhere.invite(), scene.node)
    return scene.renew(scene.here)


def revoked_member(scene: Scene) -> Attempt:
    join(scene.here.invite(), scene.node)
    scene.here.members.revoke("ann")
    return scene.renew(scene.here)


def lost_key(scene: Scene) -> Attempt:
    join(scene.here.invite(), scene.node)
    (scene.node / "key.pem").unlink()
    return scene.renew(scene.here)


def key_of_another_member(scene: Scene) -> Attempt:
    join(scene.here.invite(), scene.node)
    other = join(scene.here.invite("ben"), scene.node.with_name("ben")).identity
    (scene.node / "key.pem").write_bytes(other.key)
    return scene.renew(scene.here)


def member_that_the_server_forgot(scene: Scene) -> Attempt:
    save_identity(issue(scene.here.trust.authority, "ann", "device"), scene.node)
    return scene.renew(scene.here)


def old_client_without_keys(scene: Scene) -> Attempt:
    options = NodeOptions(f"192.0.2.1:{scene.here.port}", threads=1)
    return lambda: find_standing(options, "", "ann", scene.node, False)


@pytest.mark.parametrize(
    ("situation", "kind", "message"),
    [
        (used, Refused, r"has been used already.*edgelam invite ann"),
        (expired, Refused, r"has expired: it was good until 20\d\d.*edgelam invite ann"),
        (withdrawn, Refused, r"was withdrawn.*edgelam invite ann"),
        (replaced, Refused, r"was withdrawn.*edgelam invite ann"),
        (of_another_federation, Refused, r"no such invite for ann.*another federation's.*edgelam invite ann"),
        (of_another_name, Refused, r"no such invite for ben.*edgelam invite ben"),
        (name_in_use, Refused, r"the name ann belongs to another node; ask for an invite with another name"),
        (of_a_member_since_revoked, Refused, r"has been used already.*edgelam invite ann"),
        (fingerprint_that_does_not_match, EnvironmentProblem, r"not the one.*Nothing secret was sent.*new invite"),
        (second_authority_behind_the_right_one, EnvironmentProblem, r"belongs to another federation.*edgelam invite"),
        (server_address_not_in_its_certificate, EnvironmentProblem, r"does not name 127.1.*--address 127.1"),
        (nobody_listens, EnvironmentProblem, r"no server answers at 127.0.0.1:1.*edgelam server"),
        (clock_years_ahead, EnvironmentProblem, r"clock is 2.0 years ahead of the server's.*Set the clock"),
        (certificate_of_another_federation, EnvironmentProblem, r"belongs to another federation.*edgelam invite"),
        (revoked_member, Refused, r"membership of ann was ended.*edgelam invite ann"),
        (lost_key, EnvironmentProblem, r"key.pem cannot be read.*edgelam invite"),
        (key_of_another_member, EnvironmentProblem, r"made for another key.*backup, or join again"),
        (member_that_the_server_forgot, Refused, r"ann is no member of this federation.*edgelam invite ann"),
        (old_client_without_keys, EnvironmentProblem, r"has no keys in .*edgelam invite NAME"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_changes_nothing_and_says_what_is_wrong_and_what_to_do(
    federation: Federation,
    elsewhere: Federation,
    tmp_path: Path,
    situation: Callable[[Scene], Attempt],
    kind: type[EdgelamError],
    message: str,
) -> None:
    attempt = situation(Scene(federation, elsewhere, tmp_path / "node"))
    known, registered = federation.members.all(), dict(federation.flower.keys)
    had_certificate = (tmp_path / "node" / "certificate.pem").exists()
    with pytest.raises(kind, match=message) as caught:
        attempt()
    assert len(str(caught.value)) < 500
    assert federation.members.all() == known
    assert federation.flower.keys == registered
    assert (tmp_path / "node" / "certificate.pem").exists() == had_certificate


def test_two_machines_that_join_at_once_with_one_token_are_one_member(federation: Federation, tmp_path: Path) -> None:
    for attempt in range(5):
        invitation = federation.invite(f"node{attempt}")
        start = threading.Barrier(4)

        def enter(machine: int, invitation: Invitation = invitation, start: threading.Barrier = start) -> str:
            start.wait()
            try:
                return join(invitation, tmp_path / f"{invitation.name}-{machine}").identity.name
            except Refused as refusal:
                return str(refusal)

        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(enter, range(4)))
        assert outcomes.count(invitation.name) == 1
        assert sum("used already" in outcome for outcome in outcomes) == 3
    assert len(federation.members.all()) == len(federation.flower.keys) == 5


def test_a_join_whose_answer_was_lost_is_taken_up_again_with_the_same_key(
    federation: Federation, tmp_path: Path
) -> None:
    invitation = federation.invite()
    register = federation.flower.register
    join(invitation, tmp_path / "ann")
    key = (tmp_path / "ann" / "key.pem").read_bytes()
    for file in (tmp_path / "ann").iterdir():
        file.unlink()
    (tmp_path / "ann" / "joining.pem").write_bytes(key)  # as if the answer had not come
    assert join(invitation, tmp_path / "ann").identity.key == key
    assert federation.flower.register == register
    assert len(federation.flower.keys) == 1


def test_a_revoked_node_is_out_everywhere_and_may_be_invited_anew(federation: Federation, tmp_path: Path) -> None:
    server = f"127.0.0.1:{federation.port}"
    first = join(federation.invite(), tmp_path / "ann").identity
    assert federation.members.revoked_serials() == frozenset()
    federation.members.revoke("ann")
    assert Members(federation.folder / "trust").revoked_serials() == {peer_of(first.certificate).serial}
    assert federation.flower.keys
    sync(server, federation.trust.authority.certificate)
    assert not federation.flower.keys
    with pytest.raises(Refused, match=r"membership of ann was ended.*edgelam invite ann"):
        renew(server, tmp_path / "ann")
    with pytest.raises(ConfigError, match="was revoked already"):
        federation.members.revoke("ann")
    again = join(federation.invite(), tmp_path / "ann").identity
    assert again.key != first.key
    assert federation.members.revoked_serials() == {peer_of(first.certificate).serial}
    assert len(federation.flower.keys) == 1


def test_revoking_a_stranger_names_the_nearest_member(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no members"):
        federation.members.revoke("ann")
    join(federation.invite(), tmp_path / "ann")
    with pytest.raises(ConfigError, match="did you mean 'ann'"):
        federation.members.revoke("amn")


def test_certificates_are_renewed_before_they_expire_and_after(federation: Federation, tmp_path: Path) -> None:
    server = f"127.0.0.1:{federation.port}"
    first = join(federation.invite(), tmp_path / "ann").identity
    assert renew(server, tmp_path / "ann").identity == first
    for passed in (0.5, 0.7, 1.5):
        federation.ahead_s = passed * NODE_VALID.total_seconds()
        now = renew(server, tmp_path / "ann").identity
        assert (now.certificate == first.certificate) == (passed == 0.5)
        assert now.key == first.key
        assert load_identity(tmp_path / "ann") == now
    federation.members.revoke("ann")
    assert len(federation.members.revoked_serials()) == 3


def test_a_running_node_asks_now_and_then_and_ends_when_it_is_no_member(federation: Federation, tmp_path: Path) -> None:
    join(federation.invite(), tmp_path / "ann")
    renewals = Renewals(f"127.0.0.1:{federation.port}", tmp_path / "ann")
    assert not renewals.check()
    assert not renewals.check(now=True), "the certificate lasts"
    federation.ahead_s = 0.7 * NODE_VALID.total_seconds()
    assert not renewals.check(), "it is not time to ask"
    renewals.due = time.monotonic()
    assert renewals.check()
    unreachable = Renewals("127.0.0.1:1", tmp_path / "ann")
    assert not unreachable.check(now=True)
    federation.members.revoke("ann")
    with pytest.raises(Refused, match="membership of ann was ended"):
        renewals.check(now=True)


@pytest.mark.parametrize("ahead_s", [-56 * 365 * DAY_S, -DAY_S, 0.0, 30 * DAY_S])
def test_wrong_clocks_of_boards_are_tolerated_and_measured(
    federation: Federation, tmp_path: Path, ahead_s: float
) -> None:
    joined = join(federation.invite(), tmp_path / "ann", clock=lambda: time.time() + ahead_s)
    assert joined.ahead_s == pytest.approx(ahead_s, abs=30)
    assert bool(clock_words(joined.ahead_s)) == bool(ahead_s)


def test_a_clock_years_ahead_is_refused_before_the_token_is_sent(federation: Federation, tmp_path: Path) -> None:
    invitation = federation.invite()
    with pytest.raises(EnvironmentProblem, match=r"clock is 2.0 years ahead of the server's.*Set the clock"):
        join(invitation, tmp_path / "ann", clock=lambda: time.time() + 2 * 365 * DAY_S)
    assert join(invitation, tmp_path / "ann")


def test_words_about_clocks() -> None:
    assert clock_words(-30.0) == ""
    assert clock_words(-90 * 60.0) == "this machine's clock is 1.5 hours behind the server's"
    assert clock_words(3 * DAY_S) == "this machine's clock is 3.0 days ahead of the server's"


def test_a_server_in_plain_text_is_said_to_be_one(tmp_path: Path) -> None:
    server = Quiet(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        invitation = Invitation(f"127.0.0.1:{server.server_address[1]}", "device", "ann", "x" * 22, "0" * 64)
        with pytest.raises(EnvironmentProblem, match=r"does not answer in TLS|no server answers"):
            join(invitation, tmp_path)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"signed": "[]", "signature": ""},
        {"signed": 3, "signature": 4},
        {"signed": "{" * 10000, "signature": "00"},
        {"signed": json.dumps({"purpose": "join", "name": 1, "token": [], "public_key": None}), "signature": "00"},
        sign_request({"purpose": "join", "name": "ann", "token": "t", "public_key": "garbage"}, new_key()),
        sign_request({"purpose": "renew", "name": "nobody"}, new_key()),
        sign_request(
            {"purpose": "renew", "name": "ann", "token": "t", "public_key": public_key(new_key()).decode()}, new_key()
        ),
        sign_request(
            {"purpose": "join", "name": "ann", "token": "t", "public_key": public_key(new_key()).decode()}, new_key()
        ),
    ],
)
def test_garbled_or_unsigned_requests_are_refused(federation: Federation, request_: dict) -> None:
    for handler in ("join", "renew"):
        status, answer = ask(federation, handler, request_)
        assert status in (400, 403)
        assert answer["detail"]
    assert federation.members.all() == []


def test_tokens_stand_in_no_file_of_the_server(federation: Federation, tmp_path: Path) -> None:
    invitations = [federation.invite(), federation.invite("ben")]
    join(invitations[0], tmp_path / "ann")
    files = [file for file in federation.folder.rglob("*") if file.is_file()]
    assert federation.folder / "trust" / MEMBERS_FILE in files
    content = b"".join(file.read_bytes() for file in files)
    assert b"ann" in content
    assert not any(invitation.token.encode() in content for invitation in invitations)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_private_key_leaves_the_node_in_no_request(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = bytearray()
    send = ssl.SSLSocket.sendall

    def recorded(self: ssl.SSLSocket, data: bytes, flags: int = 0) -> None:
        sent.extend(data)
        send(self, data, flags)

    monkeypatch.setattr(ssl.SSLSocket, "sendall", recorded)
    join(federation.invite(), tmp_path / "ann")
    renew(f"127.0.0.1:{federation.port}", tmp_path / "ann")
    key = (tmp_path / "ann" / "key.pem").read_bytes()
    private = load_key(key).private_numbers().private_value.to_bytes(32, "big")
    assert b"public_key" in sent
    assert not any(form in sent for form in (private, private.hex().encode(), *key.split()[3:5]))


def test_flower_learns_of_all_members_again_after_it_lost_its_database(federation: Federation, tmp_path: Path) -> None:
    ann = join(federation.invite(), tmp_path / "ann").identity
    join(federation.invite("ben"), tmp_path / "ben")
    federation.members.add(issue(federation.trust.authority, "cleo", "host"))
    federation.members.revoke("ben")
    flower = Flower()
    JoinService(federation.trust.authority, federation.members, flower.register, flower.unregister).start()
    assert len(flower.keys) == 2
    assert federation.members.find("ann").flower_id in flower.keys
    assert public_key(ann.key) == federation.members.find("ann").public_key
    assert federation.members.leaving() == []


def test_addresses_in_the_servers_certificate(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"no server has run with the state.*edgelam server.*--state"):
        open_trust(tmp_path)
    assert prepare_trust(tmp_path, "10.1.2.3", 8000).address == "10.1.2.3:8000"
    first = open_trust(tmp_path)
    assert prepare_trust(tmp_path, "0.0.0.0", 8000, ["edge.example"]).address == "edge.example:8000"
    assert open_trust(tmp_path).authority.fingerprint == first.authority.fingerprint
    server = load_identity(first.identity)
    assert (server.name, server.role) == ("server", "server")
    assert valid_until(server.certificate) == valid_until(server.authority)


@pytest.mark.parametrize("name", ["server", "a b", "../x", "", "x" * 64])
def test_names_that_no_node_may_have_are_not_invited(federation: Federation, name: str) -> None:
    with pytest.raises(ConfigError, match="NAME"):
        federation.invite(name)
    with pytest.raises(ConfigError, match="--role 'server'"):
        federation.invite("ann", "server")


def test_an_invitation_is_one_word_that_reads_back(federation: Federation) -> None:
    invitation = replace(federation.invite("ann.b_c-1"), server="[fd00::1]:8000")
    assert parse_invitation(f" {invitation.text}\n") == invitation
    assert invitation.command == f"edgelam client --join '{invitation.text}' --data FILE"
    host = replace(invitation, server="edge:1", role="host")
    assert host.command == f"edgelam client --join {host.text}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], "not whole; paste it whole"),
        (lambda text: text.replace("edgelam1/", ""), "no join text"),
        (lambda text: text.replace("/device/", "/server/"), "'server' is no role"),
        (lambda text: text.replace(":8000/", "/"), "must be HOST:PORT"),
        (lambda text: f"{text}/more", "no join text"),
        (lambda text: "", "no join text"),
    ],
)
def test_a_join_text_that_is_cut_or_changed_is_refused(change: Callable[[str], str], message: str) -> None:
    text = Invitation("10.0.0.1:8000", "device", "ann", "t" * 22, "0" * 64).text
    with pytest.raises(ConfigError, match=message):
        parse_invitation(change(text))


def test_durations() -> None:
    assert [parse_duration_s(text, "--expires") for text in ("30m", "1h", "7d")] == [1800.0, 3600.0, 604800.0]
    for text in ("", "h", "1", "0h", "1.5h", "-1h", "99999d"):
        with pytest.raises(ConfigError, match="--expires"):
            parse_duration_s(text, "--expires")


def test_a_copied_identity_folder_of_two_members_is_not_mixed(federation: Federation, tmp_path: Path) -> None:
    join(federation.invite(), tmp_path / "ann")
    save_identity(join(federation.invite("ben"), tmp_path / "ben").identity, tmp_path / "ann")
    assert load_identity(tmp_path / "ann").name == "ben"


# ---------------------------------------------------------------- a new authority beside the old one


def host_of(federation: Federation) -> DataPlaneServer:
    """Opens the data port of a host of the federation, which lets in every member."""

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        link.open(terms(answer=ready()))
        return ready()

    return DataPlaneServer(
        "127.0.0.1", 0, admit, security=Security(issue(federation.trust.authority, "edge-1", "host"))
    )


def call(host: DataPlaneServer, identity: Identity, ready_s: float = WAIT_S) -> Link:
    return dial(
        "edge-1", f"127.0.0.1:{host.port}", "entry edge-1", hello(node=identity.name), ByteCounters(), make_terms(), ready_s,
        security=Security(identity),
    )  # fmt: skip


def test_a_node_is_a_member_of_an_old_and_a_new_federation_until_the_old_one_is_gone(
    federation: Federation, elsewhere: Federation, tmp_path: Path
) -> None:
    """Moves a node to a new authority as docs/deployment.md says: two servers, and on the node two clients with a state folder each.

    Shows that neither membership touches the other: keys, servers, links, renewal, and the end of the old one.
    """
    states, data = tmp_path / ".edgelam", tmp_path / "ann.jsonl"
    folders = {federation: states / "ann", elsewhere: states / "new-ann"}

    def standing(state: Path | None, joining: str = "") -> Standing:
        return find_standing(NodeOptions(data=data), joining, "", state, False, states)

    standing(None, federation.invite().text).join()
    standing(folders[elsewhere], elsewhere.invite().text).join()
    own = {server: load_identity(folder / "identity") for server, folder in folders.items()}
    assert {identity.name for identity in own.values()} == {"ann"}
    assert own[federation].key != own[elsewhere].key
    for server, folder in folders.items():
        assert standing(folder).options.server == server.address
    with pytest.raises(ConfigError, match=rf"\(ann, new-ann\); say which one with --state, as in --state {states}/ann"):
        standing(None)

    hosts = {server: host_of(server) for server in folders}
    for server, other in ((federation, elsewhere), (elsewhere, federation)):
        link = call(hosts[server], own[server])
        with pytest.raises(PeerLost, match="its certificate is not of this federation"):
            call(hosts[server], own[other], 0.2)
        assert renew(server.address, folders[server] / "identity").identity == own[server]
        with pytest.raises(EnvironmentProblem, match="belongs to another federation"):
            renew(server.address, folders[other] / "identity")
        assert not link.closed
        link.close()

    federation.members.revoke("ann")
    with pytest.raises(Refused, match="membership of ann was ended"):
        renew(federation.address, folders[federation] / "identity")
    shutil.rmtree(federation.folder / "trust")
    shutil.rmtree(folders[federation])
    assert renew(elsewhere.address, standing(None).state / "identity").identity == own[elsewhere]
    call(hosts[elsewhere], own[elsewhere]).close()
    for host in hosts.values():
        host.stop()
