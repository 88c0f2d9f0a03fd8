"""What a member proves itself with: its key, its certificate and the authority's certificate, as files of one folder.

Knows neither who signs certificates nor what they are used for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import write_private

SERVER, DEVICE, HOST = "server", "device", "host"
ROLES = (SERVER, DEVICE, HOST)
KEY_FILE, CERTIFICATE_FILE, AUTHORITY_FILE = "key.pem", "certificate.pem", "authority.pem"
_FILES = {"key": KEY_FILE, "certificate": CERTIFICATE_FILE, "authority": AUTHORITY_FILE}


@dataclass(frozen=True)
class Identity:
    """A member's name, role, private key and certificate, and the certificate of the authority that signed it."""

    name: str
    role: str
    """One of ROLES."""
    key: bytes
    """The private key, PEM."""
    certificate: bytes
    """PEM."""
    authority: bytes
    """The authority's certificate, PEM: what others' certificates are checked against."""


@dataclass(frozen=True)
class Peer:
    """Who the other end of a connection is, read from a certificate that the connection has verified."""

    name: str
    role: str
    serial: str
    """The certificate's number in hexadecimal, by which it is revoked."""


def save_identity(identity: Identity, folder: Path) -> None:
    """Writes the identity's files, readable by this user only."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for field, file in _FILES.items():
        write_private(folder / file, getattr(identity, field))


def load_identity(folder: Path) -> Identity:
    """Reads the identity of a folder. Raises EnvironmentProblem if files are missing, damaged or do not belong together."""
    found = {}
    for field, file in _FILES.items():
        try:
            found[field] = (folder / file).read_bytes()
        except OSError as error:
            raise EnvironmentProblem(
                f"{folder / file} cannot be read ({error.strerror}): this machine has no keys there; join the federation "
                f"with a join command of `edgelam invite NAME` on its server"
            ) from error
    try:
        return identity_of(**found)
    except EnvironmentProblem as error:
        raise EnvironmentProblem(f"{folder}: {error}; restore the folder from a backup, or join again") from error


def identity_of(key: bytes, certificate: bytes, authority: bytes) -> Identity:
    """Returns the identity that a key and its certificate make. Raises EnvironmentProblem if the key is another one's."""
    peer = peer_of(certificate)
    if public_key(key) != certified_key(certificate):
        raise EnvironmentProblem("the certificate was made for another key")
    return Identity(peer.name, peer.role, key, certificate, authority)


def has_identity(folder: Path) -> bool:
    """Returns whether the folder holds a member's files."""
    return all((folder / file).exists() for file in _FILES.values())


def tls_name(name: str) -> str:
    """Returns the DNS name in a member's certificate, which whoever dials the member expects there.

    Members have no fixed addresses, so certificates name members. The DNS name is a hash because member names may hold what
    DNS names may not, and because a connection's first message shows the DNS name to everybody on the way.
    """
    return f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.edgelam.internal"


def peer_of(certificate: bytes) -> Peer:
    """Returns the member that a certificate (PEM) names. Raises EnvironmentProblem if no authority of ours wrote it."""
    parsed = _parse(certificate)
    names = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    roles = parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if len(names) != 1 or len(roles) != 1 or roles[0].value not in ROLES:
        raise EnvironmentProblem("the certificate names no member of a federation: it was not made by `edgelam server`")
    return Peer(str(names[0].value), str(roles[0].value), f"{parsed.serial_number:x}")


def valid_until(certificate: bytes) -> datetime:
    """Returns when a certificate (PEM) expires, in UTC."""
    return _parse(certificate).not_valid_after_utc


def fingerprint(certificate: bytes) -> str:
    """Returns the SHA-256 of a certificate (PEM) in hexadecimal."""
    return hashlib.sha256(_parse(certificate).public_bytes(serialization.Encoding.DER)).hexdigest()


def first_certificate(text: bytes) -> bytes:
    """Returns the first certificate of a text (PEM) and nothing else: a fingerprint vouches for that one alone."""
    return _parse(text).public_bytes(serialization.Encoding.PEM)


def new_key() -> bytes:
    """Makes a private key (ECDSA P-256, PEM)."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    """Parses a private key (PEM). Raises EnvironmentProblem if it is not one of ours."""
    try:
        parsed = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise EnvironmentProblem(f"the private key is damaged ({error})") from error
    if not isinstance(parsed, ec.EllipticCurvePrivateKey):
        raise EnvironmentProblem("the private key is not ECDSA")
    return parsed


def public_key(key: bytes) -> bytes:
    """Returns the public half (PEM) of a private key (PEM)."""
    return _public_pem(load_key(key).public_key())


def public_key_ssh(public: bytes) -> str:
    """Returns a public key (PEM) as Flower registers it: one line of OpenSSH."""
    parsed = serialization.load_pem_public_key(public)
    return parsed.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def certified_key(certificate: bytes) -> bytes:
    """Returns the public key (PEM) that a certificate (PEM) is about."""
    return _public_pem(_parse(certificate).public_key())


def _public_pem(public: object) -> bytes:
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return b""
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _parse(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise EnvironmentProblem(f"the certificate is damaged ({error})") from error
