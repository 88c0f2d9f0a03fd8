"""A conversation with a run's result over the federation's hosts: the caller is one more device, and trains nothing.

The hosts get plans that serve generation; the caller's own plan, with its route and its secret token, is left in a file
that only this user can read. The caller (`edgelam chat --server`) then dials the hosts itself: no text passes the server.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from edgelam_fl.errors import RunFailed
from edgelam_fl.files import write_private
from edgelam_fl.flower import to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.limits import positions_of
from edgelam_fl.names import CALLER
from edgelam_fl.plan.layout import who_may_host
from edgelam_fl.plan.making import RoundFacts, make_plans, task_settings
from edgelam_fl.plan.placement import Placement
from edgelam_fl.plan.reading import job_id
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import RouteReady, RunDone, RunFailure
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import Exchange, ExchangeTiming, Missing, Request
from server.global_adapter import starting_point
from server.hub import RunHub
from server.membership import owners
from server.roster import Roster
from server.run_folder import RunFolder
from server.run_queue import turn_now


def converse(grid: Grid, spec: RunSpec, hub: RunHub, session: Path, adapter: Path, queue: str = "") -> None:
    """Serves one conversation; returns when the caller has left. `session`: a folder for its events and the route. `queue`: folder of
    the queue of the server's runs, which wait meanwhile; "": there is none.

    Raises RunFailed if the hosts of one site do not come, or leave; its subclass Busy if a run uses the nodes.
    """
    folder, exchange = RunFolder(session, spec), Exchange(grid, ExchangeTiming())
    request = pb.ProfileRequest(protocol_version=PROTOCOL_VERSION, task=task_settings(spec.config), hub_port=hub.port)
    roster = Roster(exchange, folder, request, owner_of=owners(os.environ), codecs=spec.config.wire.lossy_codecs)
    try:
        with turn_now(queue, f"chat with {session.parent.parent.name}") as ticket:
            hub.free(ticket.left_over if ticket is not None else ())
            roster.await_hosts(spec.config)
            plans = _plan(spec, roster, folder, hub, alone=ticket is not None)
            if ticket is not None:
                ticket.uses(plans.keys() - {CALLER}, job_id(plans[CALLER]))
            jobs = list(_jobs(plans, roster, adapters.read_peft_folder(adapter)))
            write_private(session / "route", plans[CALLER].SerializeToString())
            folder.emit(RouteReady())
            answers = list(exchange.replies(jobs, spec.config.federation.round_deadline_s))
        missing = {answer.name: answer.reason for answer in answers if isinstance(answer, Missing)}
        if missing:
            raise RunFailed("; ".join(f"{name}: {reason}" for name, reason in sorted(missing.items())))
    except RunFailed as error:
        folder.emit(RunFailure(reason=str(error), kept="the run itself is untouched", exit_code=error.exit_code))
        raise
    folder.emit(RunDone(summary=""))


def _jobs(plans: Mapping[str, pb.Plan], roster: Roster, held: adapters.Adapter) -> Iterator[Request]:
    """Yields the hosts' plans as messages, each with the part of the adapter that its host needs; completes the plans."""
    for name, plan in plans.items():
        if name == CALLER:
            continue
        tensors = starting_point(plan, held, {})
        plan.adapter_digest = adapters.digest(tensors)
        content = RecordDict({"plan": ConfigRecord({"plan": plan.SerializeToString()})})
        content["adapter"] = to_record(tensors)
        yield roster.request(name, "evaluate", content)


def _plan(spec: RunSpec, roster: Roster, folder: RunFolder, hub: RunHub, *, alone: bool) -> dict[str, pb.Plan]:
    """Returns the plans of the caller and of its hosts. Raises RunFailed if there are too few hosts for one site."""
    caller = pb.Profile(name=CALLER, role=pb.DEVICE)
    layout = Placement(spec).layout(1, [caller], who_may_host(spec.config, roster.profiles.values()))
    facts = RoundFacts(
        f"{folder.path.name}-{time.time_ns():x}",
        1,
        1,
        0,
        0,
        hub_port=hub.port,
        relay_key=hub.relay_key,
        slices_token=hub.slices_token,
        alone=alone,
    )
    profiles = {**roster.profiles, CALLER: caller}
    plans = make_plans(spec, facts, profiles, layout, {}, {CALLER: secrets.token_bytes(16)})
    positions = positions_of(spec.source)
    for plan in plans.values():
        plan.generate, plan.evaluate = True, False
        plan.window = plan.micro_batches = plan.batch_size = 1
        plan.task.max_tokens = positions.most if positions else plan.task.max_tokens
    return plans
