"""Submits a run to a SuperLink through Flower's own command, follows the run's events and stops it.

Knows Flower's command line and the two events that end a run; knows no other event and no process of the federation.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelam_fl.addresses import is_loopback, split_address
from edgelam_fl.config import RunConfig, to_toml
from edgelam_fl.errors import EnvironmentProblem, RunFailed
from edgelam_fl.federation.app_archive import app_alone
from edgelam_fl.federation.environment import child_environment, without_proxies
from edgelam_fl.federation.operator import Operator
from edgelam_fl.federation.server_probe import is_healthy
from edgelam_fl.federation.server_runs import ServerRuns, ServerTail
from edgelam_fl.names import without_colours
from edgelam_fl.telemetry.events import EVENTS_FILE, RUN_ENDS, Event, EventTail, RoundProgress
from edgelam_fl.telemetry.progress import ProgressTail
from edgelam_fl.telemetry.run_folder import kept

_COMMAND_DEADLINE_S = 180.0  # Flower's commands take seconds here, and many on a small board that is busy
_STATUS_DEADLINE_S = 30.0  # a server that stands still accepts connections all the same
_REMOTE_POLL_S = 1.0  # between two questions to a server on another machine
_ERROR = re.compile(
    r"(?:[\w.]+\.)?\w*(?:Error|Exception|Failed|Problem|Refused|Lost): .+"
)  # how Python ends a traceback
_MOST_UNKNOWN = 2  # answers of Flower that it does not know a run, one after the other


@dataclass(frozen=True, kw_only=True)
class FollowTiming:
    """Times and pauses for following a run. The defaults suit a run that takes minutes or hours."""

    poll_s: float = 0.25
    """Seconds between two looks at the run's events."""
    silence_s: float = 45.0
    """Seconds without an event after which Flower is asked for the run's status, which costs seconds of a core."""
    look_s: float = 5.0
    """Seconds without an event after which, and between which, it is seen whether the server answers."""
    gone_s: float = 60.0
    """Seconds without an answer of the server after which the run is followed no more."""
    lag_s: float = 5.0
    """Seconds that the last events of a run may take to be readable after Flower reports that the run is finished."""


def run_events(
    file: Path,
    status: Callable[[], str],
    deadline_s: float = math.inf,
    *,
    tail: EventTail | ServerTail | None = None,
    options: str = "",
    server: ServerWatch | None = None,
    awaited: str = "the run's end",
    meanwhile: Callable[[], object] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    log: Callable[[], str] = lambda: "see `flwr log`",
    timing: FollowTiming = FollowTiming(),
) -> Iterator[Event]:
    """Yields the events of a run from `file` as they come; ends after `RunDone` or `RunFailure`. Between them comes a `RoundProgress`
    whenever a new one is in the file's folder, which is then no event of `file`.

    status: asks Flower for the run's status, after a silence only. tail: has read `file` up to where the run begins; None: it
    begins with the file; a `ServerTail`: the file is on the server's machine. options: of the command that goes on with the run, for messages. server: sees whether the server answers; None: it does. meanwhile: called at every look; a true
    result is a sign of life from elsewhere, so that nobody is asked. say: receives a line if Flower has not begun the run, or
    if the server does not answer. log: the end of what the run printed. awaited: names what the caller waits for, for the
    message.

    Raises RunFailed if Flower reports the run as finished and no last event comes, if Flower does not know it, and once
    `deadline_s` has passed; EnvironmentProblem if the server has not answered for `timing.gone_s`.
    """
    tail, end = tail or EventTail(file), time.monotonic() + deadline_s
    heard, finished, unknown = time.monotonic(), "", 0
    server = server or ServerWatch("", lambda: True, timing)
    progress = tail.progress if isinstance(tail, ServerTail) else ProgressTail(file.parent).poll
    while True:
        news = [
            event for event in tail.poll() if not isinstance(event, RoundProgress)
        ]  # an older one than in the folder
        newest = progress()
        for event in [*news, *([newest] if newest is not None else [])]:
            yield event
            if isinstance(event, RUN_ENDS):
                return
        alive, now = meanwhile(), time.monotonic()
        if finished:
            if now - heard >= timing.lag_s:
                raise RunFailed(
                    f"Flower says that the run is {finished}, and it left no reason: {log()}. {kept(file.parent, options)}"
                )
        elif news or newest is not None or alive:
            heard, unknown = now, 0
        elif not server.answers(now - heard, file.parent, say):
            pass
        elif now - heard >= timing.silence_s:
            answer, heard = status(), time.monotonic()
            unknown = unknown + 1 if answer == "unknown" else 0
            if unknown >= _MOST_UNKNOWN:
                raise RunFailed(f"the server does not say what became of the run. {kept(file.parent, options)}")
            if answer in ("pending", "starting"):
                say(f"nothing was heard of the run for {timing.silence_s:.0f} s; Flower says that it is {answer}")
            finished = answer if answer.startswith("finished") else ""
        if time.monotonic() >= end:
            raise RunFailed(f"{awaited} did not come within {deadline_s:.0f} s")
        time.sleep(timing.poll_s)


class ServerWatch:
    """Sees whether a server answers while nothing is heard of a run."""

    def __init__(self, address: str, answers: Callable[[], bool], timing: FollowTiming, options: str = "") -> None:
        """`answers`: tries it. `address`, and `options` of the command that goes on with the run: for messages."""
        self._address, self._answers, self._timing, self._options = address, answers, timing, options
        self._looked, self._gone_since = -math.inf, math.inf

    def answers(self, silent_s: float, folder: Path, say: Callable[[str], None]) -> bool:
        """Returns whether the server answered the last time, and says when that changes; looks if it is time to.

        Raises EnvironmentProblem with what is kept in the run's `folder` if it has not answered for too long.
        """
        now = time.monotonic()
        if silent_s < self._timing.look_s or now - self._looked < self._timing.look_s:
            return self._gone_since == math.inf
        self._looked = now
        if self._answers():
            if self._gone_since < math.inf:
                say(f"the server at {self._address} answers again")
            self._gone_since = math.inf
            return True
        self._gone_since = min(self._gone_since, now)
        gone_s = now - self._gone_since
        if gone_s >= self._timing.gone_s:
            raise EnvironmentProblem(
                f"the server at {self._address} has not answered for {gone_s:.0f} s. Once it is started again with its state folder, "
                f"the run goes on by itself; `edgelam top {shlex.quote(str(folder))}` shows it. {kept(folder, self._options)}"
            )
        say(f"the server at {self._address} does not answer since {gone_s:.0f} s; the run goes on when it is back")
        return False


class Submission:
    """One run at one SuperLink, submitted by its operator. Flower's settings of the user stay untouched."""

    def __init__(self, operator: Operator, is_here: bool | None = None) -> None:
        """Prepares Flower's settings for the operator's server. Raises EnvironmentProblem if the operator has no token.

        is_here: whether the server is on this machine, so that a run's folder is, too; None: by its address. `options`: by which a
        command finds this server.
        """
        self._home, self._out = operator.flower_home(), Path()
        self.options = f" --server {operator.server} --operator {shlex.quote(str(operator.folder.absolute()))}"
        self._server, self._tls, self._runs = operator.server, operator.identity is not None, operator.runs()
        self._host, self._port = split_address(operator.server, "--server")
        self.is_here = is_loopback(self._host) if is_here is None else is_here
        """Returns whether runs have their folders on this machine."""
        self._operator = operator
        self._tail: EventTail | ServerTail | None = None
        self.run_id = 0

    def server_answers(self) -> bool:
        """Returns whether the server answers a question that is asked of nobody's account; one that stands still does not."""
        return is_healthy(self._host, self._port, tls=self._tls)

    def submit(
        self,
        config: RunConfig | None,
        out: Path,
        command: str = "run",
        adapter: Path | None = None,
        fabric: str = "",
        simulation: str = "",
        overrides: Sequence[str] = (),
    ) -> int:
        """Starts the run, whose folder on the server's machine is `out`. Returns Flower's run id.

        config: the run file; None: that of the folder. command: "run" trains, "resume" goes on with a run and sets the keys of
        `overrides` anew, "plan" only places the layers, "chat" talks over the hosts to the model with the adapter in
        the folder `adapter`. fabric: the folder of the process that plays all nodes. simulation: Flower's settings for
        its simulation engine.
        """
        self._tail = EventTail(out / EVENTS_FILE) if self.is_here else ServerTail(ServerRuns(self._operator), str(out))
        self._tail.poll()  # of a run that is resumed, what was said before
        values = {"run-toml": to_toml(config) if config else "", "out": str(out), "command": command,
                  "set": shlex.join(overrides),
                  "adapter": str(adapter.absolute()) if adapter else "", "fabric": fabric}  # fmt: skip
        engine = ["--federation-config", simulation] if simulation else []
        with tempfile.TemporaryDirectory(prefix="edgelam-submission-") as folder:
            text = Path(folder) / "run-config.toml"
            lines = (f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            text.write_text("".join(lines), encoding="utf-8")
            app = app_alone(Path(folder) / "app")
            answer = self.flwr("run", str(app), "--run-config", str(text), *engine)
        self.run_id, self._out = int(answer["run-id"]), out
        return self.run_id

    def events(
        self,
        deadline_s: float = math.inf,
        *,
        awaited: str = "the run's end",
        meanwhile: Callable[[], object] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
        timing: FollowTiming = FollowTiming(),
    ) -> Iterator[Event]:
        """Yields the submitted run's events as they come, the last one included. Options and errors: `run_events`."""
        if not self.is_here:
            timing = replace(timing, poll_s=max(_REMOTE_POLL_S, timing.poll_s))
        return run_events(
            self._out / EVENTS_FILE,
            self.status,
            deadline_s,
            tail=self._tail,
            options=self.options,
            server=ServerWatch(self._server, self.server_answers, timing, self.options),
            awaited=awaited,
            meanwhile=meanwhile,
            say=say,
            log=self.log,
            timing=timing,
        )

    def status(self) -> str:
        """Asks Flower for the run's status: "running", "finished:completed", "finished:failed", ...

        "unknown" if its command does not answer, as on a machine that is very busy: no reason to give a run up.
        """
        try:
            runs = self.flwr("list", "--run-id", str(self.run_id), deadline_s=_STATUS_DEADLINE_S).get("runs", [])
        except RunFailed:
            return "unknown"
        return str(runs[0]["status"]) if runs else "unknown"

    def stop(self) -> None:
        """Stops the run. A run that has ended is left as it is. Raises RunFailed if Flower cannot stop it."""
        if not self.server_answers():
            raise RunFailed(
                f"the server at {self._server} does not answer, so the run could not be stopped: it goes on once the server is started "
                f"again, unless `edgelam stop {shlex.quote(self._name_of(self._out))}{self.options}` stops it then"
            )
        try:
            self.flwr("stop", str(self.run_id))
        except RunFailed:
            if not self.status().startswith("finished"):
                raise

    @contextlib.contextmanager
    def stopped_on_error(self) -> Iterator[None]:
        """Stops the run if the block raises, and lets the block's own error out."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(RunFailed):
                self.stop()
            raise

    def log(self) -> str:
        """Returns the last words of what Flower and the ServerApp printed; how to get them if Flower is silent."""
        try:
            return last_words(self.printed())
        except RunFailed as error:
            return str(error)

    def printed(self) -> str:
        """Returns all that Flower and the ServerApp printed. Raises RunFailed if Flower is silent."""
        done = self._call("log", str(self.run_id), "--show")
        return done.stdout + done.stderr

    def how_to(self, folder: Path) -> list[str]:
        """Lists commands for a user's shell: they report on the run in `folder`, show Flower's log and stop the run."""
        flwr = f"FLWR_HOME={shlex.quote(str(self._home))} {shlex.quote(_as_typed('flwr'))}"
        run = shlex.quote(self._name_of(folder))
        return [
            f"its state:      edgelam runs{self.options}",
            f"its log:        edgelam log {run}{self.options}",
            f"stop it:        edgelam stop {run}{self.options}",
            f"Flower's log:   {flwr} log {self.run_id}",
        ]

    def _name_of(self, folder: Path) -> str:
        """Returns the name by which the server finds a run's folder."""
        return str(folder.relative_to(self._runs) if folder.is_relative_to(self._runs) else folder)

    def flwr(self, command: str, *arguments: str, deadline_s: float = _COMMAND_DEADLINE_S) -> dict[str, Any]:
        """Runs one of Flower's commands and returns its answer. Raises RunFailed with what it said."""
        done = self._call(command, *arguments, "--format", "json", deadline_s=deadline_s)
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError as error:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise RunFailed(f"`flwr {command}` failed: {said or 'no output'}") from error
        if not answer.get("success", True):
            raise RunFailed(f"`flwr {command}` failed: {answer.get('error-message', answer)}")
        return answer

    def _call(
        self, command: str, *arguments: str, deadline_s: float = _COMMAND_DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        environment = {**without_proxies(child_environment(self._host)), "FLWR_HOME": str(self._home)}
        try:
            return subprocess.run(
                ["flwr", command, *arguments],
                capture_output=True, text=True, env=environment, timeout=deadline_s, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"`flwr {command}` did not answer within {deadline_s:.0f} s") from error


def last_words(log: str, most: int = 600) -> str:
    """Returns why a program ended by what it printed, in one line: its first error, and the end of its output.

    The end alone is often a stack of whoever watched it, and the cause is far above.
    """
    lines = [line.strip() for line in without_colours(log).splitlines() if line.strip()]
    cause = next((line for line in lines if _ERROR.match(line)), "")[:most]
    end = " ".join(" ".join(lines).split())[-most:]
    return end if not cause or cause in end else f"{cause} ... {end}"


def _as_typed(tool: str) -> str:
    """Names a tool of this environment as a shell takes it: by its name if that finds the tool, else by its path."""
    path = shutil.which(tool, path=child_environment()["PATH"]) or tool
    return tool if shutil.which(tool) == path else path
