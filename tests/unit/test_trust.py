"""Keys and certificates: what is signed is what handshakes verify, and what does not belong together is refused."""

from __future__ import annotations

import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import (
    Identity,
    has_identity,
    load_identity,
    load_key,
    new_key,
    peer_of,
    public_key,
    public_key_ssh,
    save_identity,
    tls_name,
    valid_until,
)
from edgelam_fl.trust.members import Members


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "trust")


def handshake(folder: Path, server: Identity, client: Identity, name: str) -> bytes:
    """Lets two members greet each other in TLS, each verified by the other; returns the server's view of the client (DER)."""
    ours, theirs = (
        _context(folder / side, side == "server", who) for side, who in [("server", server), ("client", client)]
    )
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialled = theirs.wrap_bio(to_client, to_server, server_hostname=name)
    listening = ours.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (dialled, listening):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return listening.getpeercert(binary_form=True)


def _context(folder: Path, server_side: bool, identity: Identity) -> ssl.SSLContext:
    save_identity(identity, folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(folder / "authority.pem")
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def test_two_members_of_a_federation_verify_each_other_by_name_or_address(authority: Authority, tmp_path: Path) -> None:
    server = issue(authority, "server", "server", ["127.0.0.1", "edge.example"])
    ann = issue(authority, "Ann_1.x", "device")
    for name in (tls_name("server"), "127.0.0.1", "edge.example"):
        seen = handshake(tmp_path, server, ann, name)
        pem = ssl.DER_cert_to_PEM_cert(seen).encode()
        assert (peer_of(pem).name, peer_of(pem).role) == ("Ann_1.x", "device")
    assert handshake(tmp_path, ann, server, tls_name("Ann_1.x"))


def test_another_name_or_another_federation_is_refused(authority: Authority, tmp_path: Path) -> None:
    server, ann = issue(authority, "server", "server", ["127.0.0.1"]), issue(authority, "ann", "device")
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(tmp_path, server, ann, "192.0.2.1")
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(tmp_path, ann, server, tls_name("ben"))
    stranger = issue(Authority.open(tmp_path / "elsewhere"), "ann", "device")
    with pytest.raises(ssl.SSLError):
        handshake(tmp_path, server, stranger, "127.0.0.1")
    with pytest.raises(ssl.SSLError):
        handshake(tmp_path, stranger, server, tls_name("ann"))


def test_a_member_signs_no_certificates(authority: Authority, tmp_path: Path) -> None:
    ann = issue(authority, "ann", "device")
    forger = Authority(ann.key, ann.certificate)
    forged = issue(forger, "server", "server")
    with pytest.raises(ssl.SSLError):
        handshake(
            tmp_path,
            Identity("server", "server", forged.key, forged.certificate, authority.certificate),
            ann,
            tls_name("server"),
        )


def test_an_authority_is_made_once_and_readable_by_its_owner_alone(authority: Authority, tmp_path: Path) -> None:
    again = Authority.open(tmp_path / "trust")
    assert again.fingerprint == authority.fingerprint
    assert len(authority.fingerprint) == 64
    assert stat.S_IMODE((tmp_path / "trust").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "trust").iterdir()} == {0o600}


@pytest.mark.parametrize("lost", ["authority.key", "authority.pem"])
def test_half_an_authority_is_not_replaced_by_a_new_one(authority: Authority, tmp_path: Path, lost: str) -> None:
    (tmp_path / "trust" / lost).unlink()
    with pytest.raises(EnvironmentProblem, match=f"{lost} is missing.*backup.*invite every node again"):
        Authority.open(tmp_path / "trust")


def test_certificates_hold_before_any_clock_starts_and_expire(authority: Authority) -> None:
    parsed = x509.load_pem_x509_certificate(issue(authority, "ann", "device").certificate)
    assert parsed.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=UTC)
    assert timedelta(days=364) < parsed.not_valid_after_utc - datetime.now(UTC) < timedelta(days=366)
    server = issue(authority, "server", "server").certificate
    assert valid_until(server) == valid_until(authority.certificate)


def spki(public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    "public",
    [
        spki(ec.generate_private_key(ec.SECP384R1()).public_key()),
        spki(ed25519.Ed25519PrivateKey.generate().public_key()),
        b"garbage",
    ],
)
def test_only_our_kind_of_key_is_signed(authority: Authority, public: bytes) -> None:
    with pytest.raises(ConfigError, match="public key"):
        authority.sign(public, "ann", "device")


def test_an_identity_is_read_as_it_was_written_and_by_its_owner_alone(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    ann = issue(authority, "ann", "host")
    assert not has_identity(folder)
    save_identity(ann, folder)
    assert has_identity(folder)
    assert load_identity(folder) == ann
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    flower = load_key(load_identity(folder).key)  # what Flower's SuperNode is given
    assert isinstance(flower, ec.EllipticCurvePrivateKey)
    ssh = flower.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert ssh.decode() == public_key_ssh(public_key(ann.key))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("key.pem", None, "key.pem cannot be read.*no keys there; join"),
        ("key.pem", b"garbage", "the private key is damaged"),
        ("key.pem", new_key(), "identity: the certificate was made for another key; restore .* or join again"),
        ("certificate.pem", b"garbage", "the certificate is damaged"),
    ],
)
def test_a_node_that_lost_or_mixed_its_files_is_told_so(
    authority: Authority, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    save_identity(issue(authority, "ann", "device"), tmp_path / "identity")
    if content is None:
        (tmp_path / "identity" / file).unlink()
    else:
        (tmp_path / "identity" / file).write_bytes(content)
    with pytest.raises(EnvironmentProblem, match=message):
        load_identity(tmp_path / "identity")


def test_a_path_too_long_for_the_book_of_members_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="SQLite takes a path of at most"):
        Members(tmp_path / ("x" * 200) / ("y" * 200) / ("z" * 200))


def test_a_certificate_without_a_member_is_refused(authority: Authority) -> None:
    with pytest.raises(EnvironmentProblem, match="names no member"):
        peer_of(authority.certificate)


def test_dns_names_hide_member_names_and_tell_them_apart() -> None:
    names = ["ann", "Ann", "a.n_n", "x" * 63, "server"]
    assert len({tls_name(name).lower() for name in names}) == len(names)
    assert not any(name in tls_name(name) for name in names)
