"""The process of a fabric: one endpoint for all nodes. `edgelam bench` starts and ends it. Knows no federations."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

_CALLS_AT_ONCE = 64


def main() -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    parser = argparse.ArgumentParser(prog="edgelam fabric", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder for the endpoint")
    parser.add_argument("--seats", type=int, default=os.cpu_count() or 1, help="how many nodes may compute at a time")
    options = parser.parse_args()
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())

    import torch

    from edgelam_fl.simulation.fabric import Fabric
    from edgelam_fl.wire.control import ControlServer

    torch.set_num_threads(1)  # per node: small matrices gain nothing from more
    control = ControlServer(options.state, Fabric(options.seats).node, threads=_CALLS_AT_ONCE)
    stopped.wait()
    control.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
