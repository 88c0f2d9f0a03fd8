"""The hub's process: one gRPC server made of its parts. Knows nothing of what they do. `edgelam server` starts and watches it.

A run's ServerApp says what the hub may do for the run in small files in the hub's state folder; it finds folder and port in
its environment (`edgelam_fl.hub`).
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc

from edgelam_fl.addresses import join_address, split_address
from edgelam_fl.errors import EdgelamError, EnvironmentProblem
from edgelam_fl.hub import echo, kept, relay, slices
from edgelam_fl.hub.attendance import AwakeClock, HubAttendance, Lead
from edgelam_fl.hub.membership import MEMBERS_EVERY_S, Door, EndedMembers, read_ended
from edgelam_fl.hub.passes import relay_key
from edgelam_fl.trust.identity import load_identity
from edgelam_fl.trust.members import Members
from edgelam_fl.wire.grpc.options import server_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security

MakeService = Callable[[Path], grpc.GenericRpcHandler]  # the hub's state folder -> a service
SERVICES: tuple[MakeService, ...] = (
    echo.make_service, kept.make_service, relay.make_service, slices.make_service,
)  # fmt: skip
_MAX_STREAMS = 512  # each keeps a thread; the services limit their own further


class HubServer:
    """A port that serves the hub's services. `port` is the real one if 0 was asked for."""

    def __init__(
        self,
        host: str,
        port: int,
        state: Path,
        services: Sequence[MakeService] = SERVICES,
        security: Security = PLAIN,
        ended: Callable[[], EndedMembers] = EndedMembers,
        members_every_s: float = MEMBERS_EVERY_S,
    ) -> None:
        """`ended`: returns the memberships that have ended, by default none; it is asked every `members_every_s`."""
        state.mkdir(parents=True, exist_ok=True)
        self._door = Door(ended, members_every_s)
        options = [*server_options(most_sent_bytes=-1), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(_MAX_STREAMS, "hub"), options=options, interceptors=[self._door])
        clock = AwakeClock()
        attendance = HubAttendance(relay_key(state), clock)
        own = self._door.service(), attendance.service()
        self._server.add_generic_rpc_handlers((*own, *(make(state) for make in services)))
        try:
            self.port = security.open_port(self._server, host, port)
        except RuntimeError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened (in use, or not this machine's address); choose another with "
                "`edgelam server --data-plane HOST:PORT`"
            ) from error
        self._lead = Lead(state, attendance, clock)
        self._server.start()

    def stop(self) -> None:
        self._door.close()
        self._server.stop(grace=0.5)
        self._lead.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="edgelam hub", description="Serves a federation's hub.")
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--state", type=Path, required=True, help="folder with the files by which runs direct the hub")
    parser.add_argument("--identity", type=Path, help="folder with the server's keys; without it: plain text")
    parser.add_argument("--members", type=Path, help="folder with the server's book of members")
    parser.add_argument("--insecure", action="store_true", help="allows plain text beyond this machine")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        host, port = split_address(options.listen, "--listen")
        security = Security(load_identity(options.identity) if options.identity else None, options.insecure)
        ended = partial(read_ended, Members(options.members)) if options.members else EndedMembers
        server = HubServer(host, port, options.state, security=security, ended=ended)
    except EdgelamError as error:
        print(f"edgelam hub: {error}", file=sys.stderr)
        return error.exit_code
    print(f"the hub listens on {join_address(host, server.port)}", flush=True)
    stopped.wait()
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
