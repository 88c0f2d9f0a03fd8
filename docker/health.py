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
        _connect(_address())
    except (OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


def _address() -> str:
    """Returns unix:FILE or HOST:PORT."""
    if not os.path.exists(ENDPOINT):
        return f"127.0.0.1:{SERVER_PORT}"
    with open(ENDPOINT, encoding="utf-8") as file:
        return str(json.load(file)["address"])


def _connect(address: str) -> None:
    kind, _, place = address.partition(":")
    if kind == "unix":
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(place)
    else:
        socket.create_connection((kind, int(place)), 5).close()


if __name__ == "__main__":
    sys.exit(main())
