"""Checks a container's health: connects to the stage host at the address in endpoint.json, else to the server's port.

Docker runs it every few seconds, even on a fifth of a core, so it imports next to nothing.
"""

import json
import os.path
import socket
import sys

SERVER_PORT = 8000
ENDPOINT = "/state/endpoint.json"


def main() -> int:
    try:
        host, port = _address()
        socket.create_connection((host, port), 5).close()
    except (OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


def _address() -> tuple[str, int]:
    if not os.path.exists(ENDPOINT):
        return "127.0.0.1", SERVER_PORT
    with open(ENDPOINT, encoding="utf-8") as file:
        host, _, port = json.load(file)["address"].rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
