"""The federation's certificate authority: its key, and the certificates that it signs. Knows no members and no invites."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.files import write_private
from edgelam_fl.trust.identity import (
    AUTHORITY_FILE,
    ROLES,
    SERVER,
    Identity,
    certified_key,
    fingerprint,
    load_key,
    new_key,
    public_key,
    tls_name,
    valid_until,
)

NODE_VALID = timedelta(days=365)
_AUTHORITY_VALID = timedelta(days=20 * 365)
_ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)  # boards without a clock start here
_PUBLISHED = datetime(2026, 1, 1, tzinfo=UTC)  # an earlier time is a wrong clock
_ISSUER = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "EdgeLAM-FL federation")])


class Authority:
    """Signs the certificates of one federation's members."""

    def __init__(self, key: bytes, certificate: bytes) -> None:
        self._key = load_key(key)
        self.certificate = certificate
        """PEM."""
        if public_key(key) != certified_key(certificate):
            raise EnvironmentProblem("the authority's key is not that of its certificate; restore both from one backup")

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Loads the authority of a folder, or makes one there. Raises EnvironmentProblem if one of its files is missing."""
        files = [folder / "authority.key", folder / AUTHORITY_FILE]
        missing = [file for file in files if not file.exists()]
        if len(missing) == 1:
            raise EnvironmentProblem(
                f"{missing[0]} is missing: without it the federation's members cannot be recognised. Restore it from a "
                f"backup of {folder}; or remove that folder, and invite every node again"
            )
        if missing:
            _make(*files)
        return cls(*(file.read_bytes() for file in files))

    @property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of the authority's certificate in hexadecimal, by which nodes recognise the federation."""
        return fingerprint(self.certificate)

    def sign(
        self, public_key: bytes, name: str, role: str, addresses: Iterable[str] = (), valid: timedelta = NODE_VALID
    ) -> bytes:
        """Returns a certificate (PEM) that says: this public key (PEM) belongs to this name, in this role.

        addresses: host names and IP addresses that are verified too, for whoever dials without knowing the name.
        valid: how long; a server's certificate lasts as long as the authority's, whose key lies beside it.
        Raises ConfigError for a key that is not ECDSA P-256 or a role that is none.
        """
        public = load_public_key(public_key)
        if role not in ROLES:
            raise ConfigError(f"role {role!r} must be one of {', '.join(ROLES)}")
        until = valid_until(self.certificate) if role == SERVER else _now() + valid
        attributes = [(NameOID.COMMON_NAME, name), (NameOID.ORGANIZATIONAL_UNIT_NAME, role)]
        alternatives = [x509.DNSName(tls_name(name)), *map(_general_name, addresses)]
        builder = _builder(x509.Name([x509.NameAttribute(oid, text) for oid, text in attributes]), public, until)
        builder = (
            builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_data=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(_issued_by(self._key), critical=False)
        )
        return _signed(builder, self._key)


def issue(authority: Authority, name: str, role: str, addresses: Iterable[str] = ()) -> Identity:
    """Makes a key and has it signed: for the server itself, and for local runs, where all nodes are this machine."""
    key = new_key()
    certificate = authority.sign(public_key(key), name, role, addresses)
    return Identity(name, role, key, certificate, authority.certificate)


def load_public_key(public_key: bytes) -> ec.EllipticCurvePublicKey:
    """Parses a public key (PEM). Raises ConfigError if it is not of the one kind that is signed, ECDSA P-256."""
    try:
        public = serialization.load_pem_public_key(public_key)
    except ValueError as error:
        raise ConfigError(f"the public key cannot be read ({error})") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise ConfigError("the public key must be ECDSA P-256, as `edgelam client --join` makes it")
    return public


def _make(key_file: Path, certificate_file: Path) -> None:
    key = new_key()
    private = load_key(key)
    builder = (
        _builder(_ISSUER, private.public_key(), _now() + _AUTHORITY_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_data=False), critical=True)
        .add_extension(_issued_by(private), critical=False)
    )
    write_private(key_file, key)
    write_private(certificate_file, _signed(builder, private))
    key_file.parent.chmod(0o700)


def _builder(subject: x509.Name, public: ec.EllipticCurvePublicKey, until: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer_name=_ISSUER, subject_name=subject, public_key=public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_ALWAYS)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _issued_by(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(signs_data: bool) -> x509.KeyUsage:
    """Returns what a key may be used for: a member's for handshakes, the authority's for certificates alone."""
    return x509.KeyUsage(
        digital_signature=signs_data, key_cert_sign=not signs_data, crl_sign=not signs_data, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _now() -> datetime:
    """Returns the time, at the earliest when this program was published: certificates outlive a server without a clock."""
    return max(datetime.now(UTC), _PUBLISHED)


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)
