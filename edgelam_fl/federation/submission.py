"""Submitting a run to a SuperLink through Flower's own CLI, and asking what became of it."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from edgelam_fl.config import RunConfig, to_toml
from edgelam_fl.errors import RunFailed
from edgelam_fl.federation.child import tool_environment
from edgelam_fl.federation.flower_app import app_folder

_DEADLINE_S = 180.0  # Flower's commands take seconds here, and many on a small board that is busy


def _as_typed(tool: str) -> str:
    """A tool of this environment's: its name where a shell finds it by that, else its path."""
    path = shutil.which(tool, path=tool_environment()["PATH"]) or tool
    return tool if shutil.which(tool) == path else path


class Submission:
    """One run at one SuperLink. Keeps Flower's settings in a folder of its own, so that the user's stay untouched."""

    def __init__(self, server: str, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{server}"\ninsecure = true\n',
            encoding="utf-8",
        )
        self._home = home
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
        """Starts the run; its folder on the server's machine is `out`. Returns Flower's run id.

        `command`: "run" trains; "plan" only says who would hold what; "chat" talks over the hosts to the `adapter` in a
        folder. `fabric`, `simulation`: who plays the nodes, and Flower's settings for its simulation engine.
        """
        text = self._home / "run-config.toml"
        values = {"run-toml": to_toml(config), "out": str(out), "command": command,
                  "adapter": str(adapter.absolute()) if adapter else "", "fabric": fabric}  # fmt: skip
        text.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()), encoding="utf-8")
        engine = ["--federation-config", simulation] if simulation else []
        answer = self._flwr("run", str(self.app()), "local", "--run-config", str(text), *engine)
        self.run_id = int(answer["run-id"])
        return self.run_id

    def app(self) -> Path:
        """The Flower App without what lies beside it: Flower looks at every file, and a repository has 30,000 in .venv."""
        app = app_folder()
        if app.name == "_app":
            return app
        alone = self._home / "app"
        shutil.rmtree(alone, ignore_errors=True)  # an older one's
        for part in ("server", "clients", "strategies"):
            shutil.copytree(app / part, alone / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(app / "pyproject.toml", alone)
        return alone

    def status(self) -> str:
        """Flower's word for how the run stands: "running", "finished:completed", "finished:failed", ...

        "unknown" where its command does not answer, as on a machine that is very busy: no reason to give a run up.
        """
        try:
            runs = self._flwr("list", "local", "--run-id", str(self.run_id)).get("runs", [])
        except RunFailed:
            return "unknown"
        return str(runs[0]["status"]) if runs else "unknown"

    def stop(self) -> None:
        self._flwr("stop", str(self.run_id), "local")

    def log(self) -> str:
        """The end of what Flower and the ServerApp printed."""
        done = self._call("log", str(self.run_id), "local", "--show")
        return " ".join((done.stdout + done.stderr).split())[-600:]

    def how_to(self, folder: Path) -> list[str]:
        """Commands for a user's shell: to see the run in `folder`, what Flower says of it, and to stop it."""
        flwr = f"FLWR_HOME={shlex.quote(str(self._home))} {shlex.quote(_as_typed('flwr'))}"
        return [
            f"how it stands:  edgelam report {shlex.quote(str(folder))}",
            f"its log:        {flwr} log {self.run_id} local",
            f"stop it:        {flwr} stop {self.run_id} local",
        ]

    def _flwr(self, command: str, *arguments: str) -> dict[str, Any]:
        done = self._call(command, *arguments, "--format", "json")
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError as error:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise RunFailed(f"`flwr {command}` failed: {said or 'it said nothing'}") from error
        if not answer.get("success", True):
            raise RunFailed(f"`flwr {command}` failed: {answer.get('error-message', answer)}")
        return answer

    def _call(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**tool_environment(), "FLWR_HOME": str(self._home), "FLWR_TELEMETRY_ENABLED": "0"}
        try:
            return subprocess.run(
                ["flwr", command, *arguments],
                capture_output=True, text=True, env=environment, timeout=_DEADLINE_S, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"`flwr {command}` did not answer within {_DEADLINE_S:.0f} s") from error
