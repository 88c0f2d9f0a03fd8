"""Submits a run to a SuperLink through Flower's own command, follows the run's events and stops it.

Knows Flower's command line and the two events that end a run; knows no other event and no process of the federation.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelam_fl.addresses import split_address
from edgelam_fl.config import RunConfig, to_toml
from edgelam_fl.errors import RunFailed
from edgelam_fl.federation.app_archive import app_alone
from edgelam_fl.federation.environment import child_environment, without_proxies
from edgelam_fl.federation.operator import Operator
from edgelam_fl.telemetry.events import RUN_ENDS, Event, EventTail

_COMMAND_DEADLINE_S = 180.0  # Flower's commands take seconds here, and many on a small board that is busy


@dataclass(frozen=True, kw_only=True)
class FollowTiming:
    """Times and pauses for following a run. The defaults suit a run that takes minutes or hours."""

    poll_s: float = 0.25
    """Seconds between two looks at the run's events."""
    silence_s: float = 45.0
    """Seconds without an event after which Flower is asked for the run's status, which costs seconds of a core."""
    lag_s: float = 5.0
    """Seconds that the last events of a run may take to be readable after Flower reports that the run is finished."""


def run_events(
    file: Path,
    status: Callable[[], str],
    deadline_s: float = math.inf,
    *,
    awaited: str = "the run's end",
    meanwhile: Callable[[], object] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    log: Callable[[], str] = lambda: "see `flwr log`",
    timing: FollowTiming = FollowTiming(),
) -> Iterator[Event]:
    """Yields the events of a run from `file` as they come; ends after `RunDone` or `RunFailure`.

    status: asks Flower for the run's status, after a silence only. meanwhile: called at every look; a true result is a
    sign of life from elsewhere, so that Flower is not asked. say: receives a line if Flower has not begun the run. log:
    the end of what the run printed. awaited: names what the caller waits for, for the message.

    Raises RunFailed if Flower reports the run as finished and no last event comes, and once `deadline_s` has passed.
    """
    tail, end = EventTail(file), time.monotonic() + deadline_s
    heard, finished = time.monotonic(), ""
    while True:
        news = tail.poll()
        for event in news:
            yield event
            if isinstance(event, RUN_ENDS):
                return
        alive, now = meanwhile(), time.monotonic()
        if finished:
            if now - heard >= timing.lag_s:
                raise RunFailed(f"Flower says that the run is {finished}, and it left no reason: {log()}")
        elif news or alive:
            heard = now
        elif now - heard >= timing.silence_s:
            answer, heard = status(), time.monotonic()
            if answer in ("pending", "starting"):
                say(f"nothing was heard of the run for {timing.silence_s:.0f} s; Flower says that it is {answer}")
            finished = answer if answer.startswith("finished") else ""
        if time.monotonic() >= end:
            raise RunFailed(f"{awaited} did not come within {deadline_s:.0f} s")
        time.sleep(timing.poll_s)


class Submission:
    """One run at one SuperLink, submitted by its operator. Flower's settings of the user stay untouched."""

    def __init__(self, operator: Operator) -> None:
        """Prepares Flower's settings for the operator's server. Raises EnvironmentProblem if the operator has no token."""
        self._home, self._out = operator.flower_home(), Path()
        self._host, _ = split_address(operator.server, "--server")
        self.run_id = 0

    def submit(
        self,
        config: RunConfig,
        out: Path,
        command: str = "run",
        adapter: Path | None = None,
        fabric: str = "",
        simulation: str = "",
    ) -> int:
        """Starts the run, whose folder on the server's machine is `out`. Returns Flower's run id.

        command: "run" trains, "plan" only places the layers, "chat" talks over the hosts to the model with the adapter in
        the folder `adapter`. fabric: the folder of the process that plays all nodes. simulation: Flower's settings for
        its simulation engine.
        """
        values = {"run-toml": to_toml(config), "out": str(out), "command": command,
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
        return run_events(
            self._out / "events.jsonl",
            self.status,
            deadline_s,
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
            runs = self.flwr("list", "--run-id", str(self.run_id)).get("runs", [])
        except RunFailed:
            return "unknown"
        return str(runs[0]["status"]) if runs else "unknown"

    def stop(self) -> None:
        """Stops the run. A run that has ended is left as it is. Raises RunFailed if Flower cannot stop it."""
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
        """Returns the end of what Flower and the ServerApp printed, in one line; how to get it if Flower is silent."""
        try:
            done = self._call("log", str(self.run_id), "--show")
        except RunFailed as error:
            return str(error)
        return " ".join((done.stdout + done.stderr).split())[-600:]

    def how_to(self, folder: Path) -> list[str]:
        """Lists commands for a user's shell: they report on the run in `folder`, show Flower's log and stop the run."""
        flwr = f"FLWR_HOME={shlex.quote(str(self._home))} {shlex.quote(_as_typed('flwr'))}"
        return [
            f"its state:      edgelam report {shlex.quote(str(folder))}",
            f"its log:        {flwr} log {self.run_id}",
            f"stop it:        {flwr} stop {self.run_id}",
        ]

    def flwr(self, command: str, *arguments: str) -> dict[str, Any]:
        """Runs one of Flower's commands and returns its answer. Raises RunFailed with what it said."""
        done = self._call(command, *arguments, "--format", "json")
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError as error:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise RunFailed(f"`flwr {command}` failed: {said or 'no output'}") from error
        if not answer.get("success", True):
            raise RunFailed(f"`flwr {command}` failed: {answer.get('error-message', answer)}")
        return answer

    def _call(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**without_proxies(child_environment(self._host)), "FLWR_HOME": str(self._home)}
        try:
            return subprocess.run(
                ["flwr", command, *arguments],
                capture_output=True, text=True, env=environment, timeout=_COMMAND_DEADLINE_S, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"`flwr {command}` did not answer within {_COMMAND_DEADLINE_S:.0f} s") from error


def _as_typed(tool: str) -> str:
    """Names a tool of this environment as a shell takes it: by its name if that finds the tool, else by its path."""
    path = shutil.which(tool, path=child_environment()["PATH"]) or tool
    return tool if shutil.which(tool) == path else path
