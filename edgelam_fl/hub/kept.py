"""The hub's service that keeps hosts' snapshots within a round, for the host that takes a lost one's place.

A host leaves the state of each of its adapters after so many steps; the ServerApp beside the hub reads them from the hub's state
folder. Only a host of a run of this server may leave anything, with the token of its plan, and only as itself. What a state holds is
the hosts' own business: a digest in it guards against broken transfers and disks.

    kept/RUN/000003/000001/NODE/SOURCE/8-8.snap     after 8 steps of attempt 1 of round 3
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import grpc

from edgelam_fl.files import write_private
from edgelam_fl.hub.passes import read_pass, refuse, relay_key
from edgelam_fl.hub.places import Place, PlaceLimits, Places
from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.options import channel_options
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import service_handler, stub
from edgelam_fl.wire.kept import KEPT_SERVICE, LEAVE
from edgelam_fl.wire.relay import token_metadata

FOLDER = "kept"  # in the hub's state folder
MOST_BYTES = 256 << 20  # of one state
_MOST_SOURCES, _MOST_NAME = 256, 200  # of one host; characters of a source's name
_RUNS_KEPT, _STATES_KEPT = 2, 2
_CHUNK_BYTES = 256 << 10
_LEAVE_S = 120.0  # for the whole transfer
_NAME = re.compile(r"(\d+)-(\d+)\.snap")
LIMITS = PlaceLimits(most=16, most_per_member=2, still_s=10.0)


def make_service(state: Path, limits: PlaceLimits = LIMITS) -> grpc.GenericRpcHandler:
    """Returns the service that keeps states in the hub's state folder."""
    return service_handler(KEPT_SERVICE, {LEAVE: _Kept(state, limits).leave})


class _Kept:
    def __init__(self, state: Path, limits: PlaceLimits) -> None:
        self._folder, self._key, self._places = state / FOLDER, relay_key(state), Places(limits)
        self._writing = threading.Lock()

    def leave(self, pieces: Iterator[pb.KeptPiece], context: grpc.ServicerContext) -> bytes:
        """Keeps one state, whose first piece names it. The newest few of each source stay."""
        allowed, _ = read_pass(self._key, LEAVE, context)
        with self._places.place(context) as place:
            first = _next(pieces, place) or pb.KeptPiece()
            if not (first.source and 0 < first.first_step <= first.last_step) or len(first.source) > _MOST_NAME:
                refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "a state without a source or its steps")
            data = bytearray(first.data)
            while (piece := _next(pieces, place)) is not None:
                data += piece.data
                if len(data) > MOST_BYTES:
                    refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {MOST_BYTES} bytes per state")
        run, round_, attempt, node = allowed.part.rsplit("/", 3)
        host = self._folder / _run(run) / _number(int(round_)) / _number(int(attempt)) / quote(node, safe="")
        source = host / quote(first.source, safe="")
        try:
            with self._writing:
                self._sweep(run, int(round_))
                if not source.exists() and host.exists() and len(list(host.iterdir())) >= _MOST_SOURCES:
                    refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {_MOST_SOURCES} sources per host")
                write_private(source / f"{first.first_step}-{first.last_step}.snap", bytes(data), durable=True)
                for old in sorted(source.glob("*.snap"), key=_first)[:-_STATES_KEPT]:
                    old.unlink(missing_ok=True)
        except OSError as error:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"the hub's disk: {error.strerror}")
        return b""

    def _sweep(self, run: str, round_: int) -> None:
        """Removes what is of another round of the run, and of all runs but the newest."""
        own = self._folder / _run(run)
        for older in own.glob("*"):
            if older.name != _number(round_):
                shutil.rmtree(older, ignore_errors=True)
        others = sorted((one for one in self._folder.glob("*") if one != own), key=lambda one: one.stat().st_mtime)
        for other in others[: max(0, len(others) - _RUNS_KEPT + 1)]:
            shutil.rmtree(other, ignore_errors=True)


def _next(pieces: Iterator[pb.KeptPiece], place: Place) -> pb.KeptPiece | None:
    """Returns the caller's next piece; None: there is no other."""
    with place.waiting():
        return next(pieces, None)


def leave(hub: str, token: bytes, source: str, steps: tuple[int, int], data: bytes, security: Security = PLAIN) -> None:
    """Leaves a state at the hub: that of a source after any number of steps from the first to the last of `steps`.

    `hub`: HOST:PORT. `token`: the plan's. Raises grpc.RpcError.
    """

    def pieces() -> Iterator[pb.KeptPiece]:
        yield pb.KeptPiece(source=source, first_step=steps[0], last_step=steps[1])
        for start in range(0, len(data), _CHUNK_BYTES):
            yield pb.KeptPiece(data=data[start : start + _CHUNK_BYTES])

    with security.channel(hub, SERVER, channel_options()) as channel:
        stub(channel, KEPT_SERVICE, LEAVE)(pieces(), metadata=token_metadata(token), timeout=_LEAVE_S)


# ---------------------------------------------------------------- for the ServerApp


def kept_steps(state: Path, plan: pb.Plan) -> list[pb.StepSnapshot]:
    """Lists what the hub has of a host in a plan's round, oldest first: the steps that all its sources have."""
    found = set()
    for attempt in (state / FOLDER / _run(plan.run) / _number(plan.round)).glob("*"):
        host = attempt / quote(plan.node, safe="")
        sources = [set(_covered(source)) for source in host.iterdir()] if host.is_dir() else []
        found |= {(int(attempt.name), steps) for steps in set.intersection(*sources)} if sources else set()
    return [pb.StepSnapshot(attempt=attempt, steps=steps) for attempt, steps in sorted(found)]


def kept_states(state: Path, plan: pb.Plan, attempt: int, steps: int) -> dict[str, bytes]:
    """Returns a host's states after so many steps of an attempt at a plan's round, by source."""
    host = state / FOLDER / _run(plan.run) / _number(plan.round) / _number(attempt) / quote(plan.node, safe="")
    covering = [(source, _covered(source).get(steps)) for source in host.iterdir()] if host.is_dir() else []
    return {unquote(source.name): file.read_bytes() for source, file in covering if file is not None}


def _covered(source: Path) -> dict[int, Path]:
    """Returns the file for each number of steps that a source has a state of."""
    named = [(file, _NAME.fullmatch(file.name)) for file in source.glob("*.snap")]
    return {steps: file for file, match in named if match for steps in range(int(match[1]), int(match[2]) + 1)}


def _run(run: str) -> str:
    return f"run-{quote(run, safe='')}"


def _number(number: int) -> str:
    return f"{number:06d}"


def _first(file: Path) -> int:
    return int(file.name.split("-")[0])
