"""The containers' health check: a node's stage host answers where its endpoint.json says, or a server does on its port.

Runs every few seconds, also on a fifth of a core, so it imports nothing but sockets.
"""

import json
import pathlib
import socket
import sys

SERVER_PORT = 8000
ENDPOINT = pathlib.Path("/state/endpoint.json")


def main() -> int:
    try:
        host, port = _address()
        socket.create_connection((host, port), 5).close()
    except (OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


def _address() -> tuple[str, int]:
    if not ENDPOINT.exists():
        return "127.0.0.1", SERVER_PORT
    host, _, port = json.loads(ENDPOINT.read_text(encoding="utf-8"))["address"].rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
