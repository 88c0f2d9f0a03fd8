"""Looks after the runs of a server from any machine that has the operator's folder: lists them, reads what they say, stops them.

Speaks with the server's own routes (`federation.run_service`); knows no folder of a run and nothing of Flower.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelam_fl.addresses import split_address
from edgelam_fl.errors import ConfigError, EnvironmentProblem, ProtocolError, RunFailed
from edgelam_fl.federation.guard import OWN_ROUTES
from edgelam_fl.federation.operator import Operator, address_in, operator_folder, read_token
from edgelam_fl.federation.run_service import LIST_RUNS, READ_RUN, STOP_RUN
from edgelam_fl.telemetry.events import Event, RoundProgress, parse_event
from edgelam_fl.telemetry.progress import progress_of
from edgelam_fl.telemetry.records import read_record
from edgelam_fl.telemetry.run_folder import FINAL, RunLine, run_line
from edgelam_fl.trust.identity import load_identity

_ANSWER_S = 60.0  # a small board reads many long runs for a list
_MOST_BYTES = 64 << 20
_ERRORS = {400: ConfigError, 409: RunFailed}


class ServerRuns:
    """The runs of one server, for its operator. Raises EnvironmentProblem if the server cannot be asked."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self._token = operator, read_token(operator.folder)
        self._trusted = None if operator.identity is None else _trusting(load_identity(operator.identity).authority)

    def lines(self) -> tuple[list[RunLine], int]:
        """Returns the newest runs, and how many older ones there are."""
        answer = self._ask(LIST_RUNS, {})
        return [read_record(RunLine, line) for line in answer["runs"]], int(answer["left_out"])

    def stop(self, run: str) -> str:
        """Stops a run; returns its name. Raises ConfigError for one that the server does not have, RunFailed for one that does not go on."""
        return str(self._ask(STOP_RUN, {"run": run})["name"])

    def read(self, run: str, part: int, offset: int) -> dict[str, Any]:
        """Returns the next piece of what a run said, with the fields of `EventPiece`, its `name`, its `progress` and whether it is `alive`."""
        return self._ask(READ_RUN, {"run": run, "part": part, "offset": offset})

    def _ask(self, route: str, request: Mapping[str, Any]) -> dict[str, Any]:
        host, port = split_address(self._operator.server, "--server")
        if self._trusted is None:
            connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=self._trusted)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        try:
            connection.request("POST", OWN_ROUTES + route, json.dumps(request), headers)
            with connection.getresponse() as response:
                status, body = response.status, response.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise EnvironmentProblem(f"the server at {self._operator.server} does not answer ({error})") from error
        finally:
            connection.close()
        return self._content(status, body)

    def _content(self, status: int, body: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        server = self._operator.server
        if not isinstance(answer, dict):
            raise EnvironmentProblem(
                f"what answers at {server} is no EdgeLAM-FL server (HTTP {status}); check --server"
            )
        said = str(answer.get("detail"))[:500]
        if status == 200:
            return answer
        if status in _ERRORS:
            raise _ERRORS[status](said)
        if status == 404:
            raise EnvironmentProblem(f"the server at {server} is of another version: it does not know this request")
        raise EnvironmentProblem(f"the server at {server} declines: {said}")


class ServerSource:
    """A run at a server, as `FolderSource` is one in a folder."""

    def __init__(self, runs: ServerRuns, run: str) -> None:
        self.name = run
        self._runs, self._part, self._offset = runs, 1, 0
        self._alive: bool | None = None
        self._progress: RoundProgress | None = None

    def poll(self) -> list[Event]:
        """Returns the new events. Raises ConfigError if the server has no such run, ProtocolError if what it sends are no events."""
        found: list[Event] = []
        while True:
            try:
                piece = self._runs.read(self.name, self._part, self._offset)
            except EnvironmentProblem:
                if found:  # the next look raises it
                    return found
                raise
            try:
                place = int(piece["part"]), int(piece["offset"])
                found += [parse_event(json.loads(line)) for line in piece["lines"].split("\n") if line]
                self._alive, self._progress = piece["alive"], progress_of(piece.get("progress"))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ProtocolError(f"what the server says of run {self.name} is damaged: {error!s:.100}") from error
            if place == (self._part, self._offset):
                return found
            self._part, self._offset = place

    def alive(self) -> bool | None:
        return self._alive

    def progress(self) -> RoundProgress | None:
        return self._progress if self._alive is not False else None


class ServerTail:
    """Follows a run that was submitted to a server on another machine, as `EventTail` follows a file: also before it has a folder, and
    while the server does not answer.
    """

    def __init__(self, runs: ServerRuns, run: str) -> None:
        self._source = ServerSource(runs, run)
        self._progress: RoundProgress | None = None

    def poll(self) -> list[Event]:
        """Returns the new events; none while nobody has any."""
        try:
            return self._source.poll()
        except (ConfigError, EnvironmentProblem):
            return []

    def progress(self) -> RoundProgress | None:
        """Returns where the round stands, once per news of it."""
        newest, before = self._source.progress(), self._progress
        self._progress = newest
        return newest if newest != before else None


def operator_of_run(run: Path, operator: Path) -> Operator:
    """Returns who may stop a run in a folder of this machine: the operator of the run's own server, if all of the federation is this
    machine's, else the one with the folder `operator`, at the address that its server wrote there.

    Raises RunFailed for a run that does not go on, EnvironmentProblem if there is no operator's folder.
    """
    own, line = operator_folder(run / "server"), run_line(run)
    if line.state in FINAL or (line.state == "killed" and own.is_dir()):
        raise RunFailed(f"there is nothing to stop: run {line.run} is {line.state}")
    folder = own if own.is_dir() else operator
    read_token(folder)
    return Operator(address_in(folder), folder)


def _trusting(authority: bytes) -> ssl.SSLContext:
    """Returns what verifies the server by a federation's authority (PEM) alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.decode())
    return context
