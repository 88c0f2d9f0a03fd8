"""The hub's process: one gRPC server made of its parts. Knows none of what they do. Started and watched by `edgelam server`.

What a run lets the hub do stands in small files in its state folder, written by the run's ServerApp, which finds folder and
port in its environment; so does each part, in its `handlers()`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from edgelam_fl.addresses import join_address, split_address
from edgelam_fl.errors import EdgelamError, EnvironmentProblem
from edgelam_fl.hub import STATE

# Each has `handlers()`: a list of generic handlers of gRPC.
PARTS = ("edgelam_fl.hub.echo", "edgelam_fl.hub.relay", "edgelam_fl.hub.slices")
_MAX_STREAMS = 512  # each keeps a thread; a part limits its own further
_OPTIONS = [
    ("grpc.max_receive_message_length", 6 << 20),  # as on a link
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]


class HubServer:
    """Listens at once. `port` is the real one when 0 was asked for."""

    def __init__(self, host: str, port: int, state: Path) -> None:
        state.mkdir(parents=True, exist_ok=True)
        os.environ[STATE] = str(state.absolute())
        self._server = grpc.server(ThreadPoolExecutor(_MAX_STREAMS, "hub"), options=_OPTIONS)
        for part in PARTS:
            self._server.add_generic_rpc_handlers(tuple(importlib.import_module(part).handlers()))
        try:
            self.port = self._server.add_insecure_port(join_address(host, port))
        except RuntimeError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be opened (in use, or not this machine's address); choose another with "
                "`edgelam server --data-plane HOST:PORT`"
            ) from error
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=0.5)


def main() -> int:
    parser = argparse.ArgumentParser(prog="edgelam hub", description=__doc__)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--state", type=Path, required=True, help="folder for what runs let the hub do")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        host, port = split_address(options.listen, "--listen")
        server = HubServer(host, port, options.state)
    except EdgelamError as error:
        print(f"edgelam hub: {error}", file=sys.stderr)
        return error.exit_code
    print(f"the hub listens on {host}:{server.port}", flush=True)
    stopped.wait()
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
