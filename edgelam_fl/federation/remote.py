"""Generates over the hosts of a live federation: this machine holds embedding, end layers and text, hosts the rest.

Asks the server to admit this machine as one more device for one conversation. Neighbours: `server.chat` plans it,
`serving.sessions` does the work on both ends of the links. Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from edgelam_fl.addresses import join_address, split_address
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.federation.operator import Operator
from edgelam_fl.federation.submission import FollowTiming, Submission
from edgelam_fl.files import now_in_a_name
from edgelam_fl.model.adapter import read_peft_folder
from edgelam_fl.model.bases import working_chip
from edgelam_fl.model.source import find_model
from edgelam_fl.model.stage import load_stages
from edgelam_fl.plan.reading import end_spans
from edgelam_fl.serving.generate import Speaker, Step
from edgelam_fl.serving.results import Result
from edgelam_fl.serving.sessions import RouteSession
from edgelam_fl.split.route import new_route, open_route, wire_dtype
from edgelam_fl.split.trainee import lora_of
from edgelam_fl.telemetry.events import RouteReady, RunFailure
from edgelam_fl.telemetry.waiting import waiting
from edgelam_fl.trust.identity import load_identity
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.secure import Security

_TIMING = FollowTiming(poll_s=0.2, silence_s=15.0)  # somebody waits for the answer
_PATIENCE_S = 120.0  # for a route, and for one token


class RouteSpeaker(Speaker):
    """A run's model over a route: answers greedily, with the run's adapter."""

    def __init__(self, result: Result, session: RouteSession) -> None:
        super().__init__(result.config.model, result.config.task)
        self._session = session

    @contextmanager
    def opened(self, tuned: bool) -> Iterator[Step]:
        self._session.reset()
        yield lambda ids, position: self._session.step(list(ids))


@contextmanager
def route_speaker(result: Result, operator: Operator, console: Console, device: str = "cpu") -> Iterator[RouteSpeaker]:
    """Opens a route through the federation of the operator's server and closes it after the block.

    `device`: what this end of the route computes on, as --device.

    Raises ConfigError for a run without hosts, RunFailed if the server opens no route, PeerLost or Refused if a host
    cannot be reached.
    """
    if not result.config.split.hosts:
        raise ConfigError(
            f"split.hosts = 0 in {result.folder}: this run had no hosts; `edgelam chat` without --server answers"
        )
    if operator.runs() not in result.folder.absolute().parents:
        raise ConfigError(
            f"{result.folder} is outside of {operator.runs()}, where this server keeps runs: copy the run there, or let this "
            f"machine answer (`edgelam chat` without --server)"
        )
    folder = result.folder.absolute() / "chats" / now_in_a_name()
    submission = Submission(operator)
    with waiting(console, "opening the way through the federation"):
        submission.submit(result.config, folder, "chat", result.adapter)
        with submission.stopped_on_error():
            plan = _await_route(submission, folder, result.config.federation.join_deadline_s + _PATIENCE_S)
            session = _open(result, plan, operator, device)
    try:
        yield RouteSpeaker(result, session)
    finally:
        session.finish()


def _open(result: Result, plan: pb.Plan, operator: Operator, device: str) -> RouteSession:
    chip, _ = working_chip(device)
    source = find_model(plan.model.name)
    stages = load_stages(source, end_spans(plan), plan.model.base, lora_of(plan), compute=plan.model.compute, chip=chip)
    route = new_route(plan)
    hub = join_address(split_address(operator.server, "--server")[0], plan.hub_port) if plan.hub_port else ""
    security = Security(load_identity(operator.identity) if operator.identity else None)
    open_route(partial(dial, security=security), plan, source, route, ByteCounters(), lambda event: None, hub=hub)
    adapter = read_peft_folder(result.adapter)
    return RouteSession(stages, adapter, route, wire_dtype(plan), _PATIENCE_S, plan.cut)


def _await_route(submission: Submission, folder: Path, deadline_s: float) -> pb.Plan:
    """Returns the caller's plan, once the server has made it."""
    for event in submission.events(deadline_s, awaited="a route through the federation", timing=_TIMING):
        if isinstance(event, RunFailure):
            raise RunFailed(f"the server could not open a route: {event.reason}", event.exit_code)
        if isinstance(event, RouteReady):
            file = folder / "route"
            plan = pb.Plan.FromString(file.read_bytes())
            file.unlink()  # its token is of no use to anyone else
            return plan
    raise RunFailed(f"the server ended the conversation before it began; see {folder}")
