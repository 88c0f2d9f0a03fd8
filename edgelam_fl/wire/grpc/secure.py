"""Channels and ports on which both ends prove who they are: mutual TLS with the certificates of one federation.

Without an identity everything is plain text, on this machine alone. Knows certificates; knows no plans and no services.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from edgelam_fl.addresses import is_loopback, join_address, split_address
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.trust.identity import Identity, Peer, peer_of, tls_name
from edgelam_fl.wire.grpc.options import Options
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.membership import Ended

_CERTIFICATE = "x509_pem_cert"
_REASON_S = 5.0  # until an attempt to connect that goes on has failed, too
# Words of gRPC's account of a connection that failed -> what they mean for the reader of a message.
_FAILURES = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of this federation",
    "Hostname Verification": "its certificate is another node's",
    "WRONG_VERSION_NUMBER": "it speaks plain text, and this node only TLS",
    "Socket closed": "it closed the connection; its log says whether it refused this node's certificate",
}


@dataclass(frozen=True)
class Security:
    """How a process opens channels and ports: with its identity, or in plain text."""

    identity: Identity | None = None
    """None: plain text, which never leaves this machine unless `insecure` allows it."""
    insecure: bool = False
    ended: Ended = field(default_factory=Ended, compare=False)
    """The members that nobody opens a link to, or lets in, any more."""

    def channel(self, address: str, node: str, options: Options) -> grpc.Channel:
        """Returns a channel to HOST:PORT, where only `node` can answer: its certificate has to bear that name.

        Raises EnvironmentProblem for plain text beyond this machine.
        """
        if self.identity is None:
            self._check_plain(split_address(address, "the address")[0])
            return grpc.insecure_channel(address, options=options)
        own = self.identity
        credentials = grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)
        return grpc.secure_channel(
            address, credentials, options=[*options, ("grpc.ssl_target_name_override", tls_name(node))]
        )

    def open_port(self, server: grpc.Server, host: str, port: int) -> int:
        """Lets a server listen, to members of the federation alone if there is an identity; returns the port.

        Raises EnvironmentProblem for plain text beyond this machine, RuntimeError for a port that cannot be opened.
        """
        address = join_address(host, port)
        if self.identity is None:
            self._check_plain(host)
            return int(server.add_insecure_port(address))
        own = self.identity
        credentials = grpc.ssl_server_credentials(
            [(own.key, own.certificate)], root_certificates=own.authority, require_client_auth=True
        )
        return int(server.add_secure_port(address, credentials))

    def _check_plain(self, host: str) -> None:
        if not self.insecure and not is_loopback(host):
            raise EnvironmentProblem(
                f"{host} is beyond this machine, and without keys everything there would be plain text: join the "
                "federation (`edgelam invite NAME` on its server prints the command), or allow it with --insecure"
            )


PLAIN = Security()


def peer(context: grpc.ServicerContext) -> Peer | None:
    """Returns the member at the other end of a call; None: the port is plain, and nobody is known.

    A call on a port with an identity always has a member: without one its connection would not stand.
    """
    certificates = context.auth_context().get(_CERTIFICATE)
    return peer_of(certificates[0]) if certificates else None


def why_unreachable(channel: grpc.Channel) -> str:
    """Returns why a channel that has failed to connect did so, in words for people."""
    try:
        stub(channel, "Echo", "Ping")(b"", timeout=_REASON_S)
    except grpc.RpcError as error:
        details = error.details() or ""
        return next((meaning for words, meaning in _FAILURES.items() if words in details), "nobody listens there")
    return "nobody listens there"
