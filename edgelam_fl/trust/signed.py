"""Requests that a node signs with its own key, so that nobody else can make them. Knows no meaning of a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgelam_fl.errors import ConfigError, Refused
from edgelam_fl.trust.identity import load_key

_ALGORITHM = ec.ECDSA(hashes.SHA256())


def sign_request(fields: Mapping[str, str], key: bytes) -> dict[str, str]:
    """Returns the request as JSON fields, signed by a private key (PEM)."""
    text = json.dumps(dict(fields))
    return {"signed": text, "signature": load_key(key).sign(text.encode(), _ALGORITHM).hex()}


def fields_of(request: Mapping[str, Any], *names: str) -> list[str]:
    """Returns the named fields of a signed request, not yet verified. Raises ConfigError if the request is malformed."""
    try:
        fields = json.loads(request["signed"])
        values = [fields[name] for name in names]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the request must hold {', '.join(names)}, signed") from error
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{', '.join(names)} of the request must be texts")
    return values


def verify_request(request: Mapping[str, Any], public: bytes) -> None:
    """Raises Refused if the request was not signed by the owner of a public key (PEM)."""
    try:
        owner = serialization.load_pem_public_key(public)
        if not isinstance(owner, ec.EllipticCurvePublicKey):
            raise Refused("the key is not ECDSA")
        owner.verify(bytes.fromhex(request["signature"]), request["signed"].encode(), _ALGORITHM)
    except (InvalidSignature, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused("the request is not signed by the key that it names") from error
