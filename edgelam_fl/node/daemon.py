"""The process of a stage host: keeps a node's slice in memory, serves the data plane and obeys the ClientApp.

`edgelam client` starts it and watches it. Joins `node.service` with gRPC, and knows nothing else of either.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgelam_fl.addresses import join_address, split_address
from edgelam_fl.bounds import bounds_of_modules
from edgelam_fl.errors import EdgelamError, EnvironmentProblem
from edgelam_fl.files import Hold, holder_of, sweep
from edgelam_fl.machine import end_with_parent
from edgelam_fl.telemetry.events import EVENTS_FILE, EventLog, NodeReady
from edgelam_fl.telemetry.progress import clear_progress

if TYPE_CHECKING:
    import torch

    from edgelam_fl.node.examples import DeviceExamples
    from edgelam_fl.node.held import Held
    from edgelam_fl.node.part import Part
    from edgelam_fl.node.service import StageHost
    from edgelam_fl.wire.grpc.secure import Security

_PREDECESSOR_S = 20.0  # a stage host takes less from SIGTERM to its end
_LOCK = ".stage-host.lock"
_MOST_EVENTS_BYTES = 8 << 20  # and as much again in the file before: a board's card is small


def main() -> int:
    """Runs a stage host; returns the exit status."""
    options = _parse(sys.argv[1:])
    try:
        return serve(options)
    except EdgelamError as error:
        print(f"edgelam stage host {options.name}: {error}", file=sys.stderr)
        return error.exit_code


def serve(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT, or until the process that started it is gone.

    Raises EnvironmentProblem if the port of the data plane cannot be opened, the node's keys cannot be read, the state folder
    is another stage host's, or the chip that it is to compute on is not here.
    """
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    end_with_parent()
    hold = lock_state(options.state)
    sweep(options.state)
    clear_progress(options.state)

    from edgelam_fl.wire.control import ControlServer
    from edgelam_fl.wire.grpc.serve import DataPlaneServer

    security = _security(options)
    log = EventLog(options.state / EVENTS_FILE, _MOST_EVENTS_BYTES)
    chip, words = _chip_of(options.device)
    node = _make_node(options, log, security, chip)
    data_plane = None
    listen = listen_address(options.listen, is_device=options.data is not None)
    if listen is not None:
        data_plane = DataPlaneServer(*listen, node.admit, security=security)
        node.address = node.address or join_address(listen[0], data_plane.port)
    handlers = {"GetProfile": node.profile, "Submit": node.submit, "Wait": node.wait}
    control = ControlServer(options.state, lambda _: handlers)
    log(NodeReady(name=options.name, address=node.address, chip=words))
    stopped.wait()
    node.stop()
    control.stop()
    if data_plane is not None:
        data_plane.stop()
    log.close()
    hold.release()
    return 0


def lock_state(state: Path, patience_s: float = _PREDECESSOR_S) -> Hold:
    """Makes the state folder this process's own.

    `patience_s`: for a stage host that is ending, as after its `edgelam client` was killed. Raises EnvironmentProblem after that.
    """
    try:
        return Hold(state, patience_s, _LOCK)
    except BlockingIOError as error:
        raise EnvironmentProblem(
            f"the stage host with process number {holder_of(state, _LOCK)} uses the state folder {state}: end it, or give another --state"
        ) from error


def _security(options: argparse.Namespace) -> Security:
    """Returns how the node opens channels and ports. Raises EnvironmentProblem for keys that are not the node's."""
    from edgelam_fl.trust.identity import load_identity
    from edgelam_fl.wire.grpc.secure import Security

    identity = load_identity(options.identity) if options.identity else None
    if identity is not None and identity.name != options.name:
        raise EnvironmentProblem(
            f"the keys in {options.identity} are those of node {identity.name!r}, and this is {options.name!r}: start it "
            "with the name that it joined by, or join again"
        )
    return Security(identity, options.insecure)


def allocating(part: Part, held: Held) -> AbstractContextManager[None]:
    """Keeps freed memory for the next tensors while a part is played, if the node has room for it."""
    from edgelam_fl.machine import memory_free_bytes
    from edgelam_fl.model.allocator import kept_if_roomy
    from edgelam_fl.split.window import units_bytes

    itemsize = max(stage.dtype.itemsize for stage in held.stages())
    return kept_if_roomy(units_bytes(part.plan, held.source, itemsize), memory_free_bytes())


def _chip_of(asked: str) -> tuple[torch.device, str]:
    """Returns the chip to compute on and the words about it, as of `working_chip`; first imports all libraries that compute."""
    from edgelam_fl.node.lean import import_libraries

    import_libraries()
    from edgelam_fl.model.bases import working_chip

    return working_chip(asked)


def _make_node(options: argparse.Namespace, log: EventLog, security: Security, chip: torch.device) -> StageHost:
    import torch

    from edgelam_fl.model.allocator import give_back_at_once
    from edgelam_fl.node.play import NodeHooks
    from edgelam_fl.node.service import StageHost
    from edgelam_fl.node.telling import Telling
    from edgelam_fl.wire.grpc.attending import Attending
    from edgelam_fl.wire.grpc.dial import dial
    from edgelam_fl.wire.grpc.following import Following
    from edgelam_fl.wire.grpc.serve import RelayedDoor
    from edgelam_fl.wire.relay import BEHIND, RELAY

    give_back_at_once()  # until a part is played
    if options.threads:
        torch.set_num_threads(options.threads)
    return StageHost(
        options.name, partial(dial, security=security), log,
        examples=_examples(options),
        address=BEHIND + options.name if options.listen == RELAY else options.advertise,
        tags=options.tag,
        trust=options.trust,
        server=split_address(options.server, "--server")[0] if options.server else "",
        open_door=partial(RelayedDoor, security=security),
        follow=partial(Following, security=security) if security.identity else None,
        attend=partial(Attending, security=security),
        tell=partial(Telling, options.state),
        security=security,
        state=options.state,
        bounds=bounds_of_modules(options.metrics),
        hooks=NodeHooks(around_play=allocating),
        chip=chip,
    )  # fmt: skip


def _examples(options: argparse.Namespace) -> DeviceExamples | None:
    """Returns a device's examples; None for an edge server."""
    from edgelam_fl.node.examples import DeviceExamples
    from edgelam_fl.tasks.kinds import device_data

    if options.data is None:
        return None
    beside = [options.eval_data] if options.eval_data is not None else []
    return DeviceExamples(options.data, partial(device_data, eval_file=options.eval_data), beside=beside)


def listen_address(listen: str, *, is_device: bool) -> tuple[str, int] | None:
    """Returns host and port for the data plane, from --listen; None for a node that nobody dials.

    An edge server without --listen gets a free port of this machine. Raises ConfigError unless `listen` is HOST:PORT.
    """
    from edgelam_fl.wire.relay import RELAY

    listen = listen or ("" if is_device else "127.0.0.1:0")
    return split_address(listen, "--listen") if listen and listen != RELAY else None


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="edgelam stage host", description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for the endpoint and the events")
    parser.add_argument(
        "--data", type=Path, help="file with a device's examples; without this option the node is an edge server"
    )
    parser.add_argument("--eval-data", type=Path, help="file with the examples that a device measures with")
    parser.add_argument(
        "--listen",
        default="",
        help="host:port of the data plane, or 'relay'; a device without this option cannot be a host",
    )
    parser.add_argument(
        "--advertise", default="", help="host:port at which others reach the data plane, if not at --listen"
    )
    parser.add_argument("--server", default="", help="host:port of the SuperLink; the hub is on the same host")
    parser.add_argument(
        "--tag", action="append", default=[], help="a word by which runs may choose the node; may be repeated"
    )
    parser.add_argument(
        "--metrics", action="append", default=[], help="module of a run's own metrics, or a folder; may be repeated"
    )
    parser.add_argument("--trust", default="hosts", help="what hosts may read of a device's text, as split.trust")
    parser.add_argument("--identity", type=Path, help="folder with the node's keys; without it: plain text")
    parser.add_argument("--insecure", action="store_true", help="allows plain text beyond this machine")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--device", default="cpu", help="what it computes on: auto, cpu, cuda, cuda:1 ..., mps, xpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
