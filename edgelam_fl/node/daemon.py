"""The stage-host daemon: one process a node that keeps the slice in memory, serves the data plane and obeys the ClientApp.

Started and watched by `edgelam client`. Only this file joins the stage host with gRPC.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from edgelam_fl.addresses import split_address
from edgelam_fl.errors import EdgelamError
from edgelam_fl.telemetry.events import EventLog, NodeReady

_MOST_EVENTS_BYTES = 8 << 20  # and as much again set aside: a board's card is small


def main() -> int:
    options = _parse(sys.argv[1:])
    try:
        return serve(options)
    except EdgelamError as error:
        print(f"edgelam stage host {options.name}: {error}", file=sys.stderr)
        return error.exit_code


def serve(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())

    import torch

    from edgelam_fl.model.allocator import give_back_at_once
    from edgelam_fl.node.service import StageHost
    from edgelam_fl.wire.control import ControlServer
    from edgelam_fl.wire.grpc.dial import dial
    from edgelam_fl.wire.grpc.serve import DataPlaneServer, RelayedDoor
    from edgelam_fl.wire.relay import BEHIND, RELAY

    give_back_at_once()
    if options.threads:
        torch.set_num_threads(options.threads)
    log = EventLog(options.state / "events.jsonl", _MOST_EVENTS_BYTES)
    node: StageHost | None = None
    data_plane = None
    listen = options.listen or ("" if options.data else "127.0.0.1:0")
    if listen == RELAY:
        listen, options.advertise = "", BEHIND + options.name
    if listen:  # a device that only dials has none
        host, _, port = listen.rpartition(":")
        data_plane = DataPlaneServer(host, int(port), lambda hello, link: node.admit(hello, link))  # type: ignore[union-attr]
    address = options.advertise or (f"{listen.rpartition(':')[0]}:{data_plane.port}" if data_plane else "")
    server = split_address(options.server, "--server")[0] if options.server else ""
    node = StageHost(options.name, dial, log, data=options.data, address=address, tags=options.tag, server=server, open_door=RelayedDoor)  # fmt: skip
    handlers = {"GetProfile": node.profile, "Submit": node.submit, "Wait": node.wait}
    control = ControlServer(options.state, lambda _: handlers)
    log(NodeReady(name=options.name, address=address))
    stopped.wait()
    node.stop()
    control.stop()
    if data_plane is not None:
        data_plane.stop()
    log.close()
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edgelam stage host", description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for the endpoint and the events")
    parser.add_argument("--data", type=Path, help="a device's examples; absent: an edge server")
    parser.add_argument(
        "--listen", default="", help="host:port of the data plane, or 'relay'; a device without it cannot be a host"
    )
    parser.add_argument("--advertise", default="", help="host:port at which others reach it, if it is not --listen")
    parser.add_argument("--server", default="", help="host:port of the SuperLink; the hub is on the same host")
    parser.add_argument("--tag", action="append", default=[], help="a word by which runs may choose it; repeat it")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
