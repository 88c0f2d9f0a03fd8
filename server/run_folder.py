"""The run's folder: configuration, events, a checkpoint after each round, and what is left when the run ends."""

from __future__ import annotations

import json
from pathlib import Path

from edgelam_fl.config import to_toml
from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.files import from_home, write_atomically
from edgelam_fl.model.adapter import write_peft_folder
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.results import BASE_MODEL
from edgelam_fl.telemetry.events import EventLog, RunDone, RunFailure, read_events
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.summary import build_summary
from server.state import FederationState


class RunFolder:
    """Writes everything that a run leaves behind. `adapter/` holds the newest checkpoint, whole at any moment."""

    def __init__(self, path: Path, spec: RunSpec) -> None:
        """Makes the folder, if need be, and writes the run's configuration into it. Raises ConfigError if one is there."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._spec = spec
        try:
            with (path / "config.toml").open("x", encoding="utf-8") as file:
                file.write(to_toml(spec.config))
        except FileExistsError as error:
            raise ConfigError(f"{path.name} is the folder of another run (nothing is ever overwritten)") from error
        base = {"model": spec.config.model.name, "files": dict(spec.source.files)}
        write_atomically(path / BASE_MODEL, json.dumps(base, indent=1) + "\n")
        self.emit = EventLog(path / "events.jsonl")

    def checkpoint(self, state: FederationState) -> str:
        """Stores the adapter that the next round starts from; returns its path, relative to this folder."""
        lora = self._spec.config.lora
        for name, tensors in {"": state.adapter, **state.exports()}.items():
            folder = self.path / "adapters" / name if name else self.path / "adapter"
            write_peft_folder(
                {**state.adapter, **tensors},
                folder,
                reference=self._spec.source.reference,
                rank=lora.rank,
                alpha=lora.alpha,
                targets=lora.targets,
                classes=self._spec.config.task.classes,
            )
        counts = {"round": state.round, "step_offset": state.step_offset}
        write_atomically(self.path / "state.json", json.dumps(counts) + "\n")
        return "adapter"

    def finish(self) -> None:
        """Writes summary.json and report.html from the events."""
        from edgelam_fl.telemetry.report.page import write_report  # its plotly takes a second to import

        self.emit(RunDone(summary="summary.json"))
        summary = build_summary(list(read_events(self.emit.path)))
        write_atomically(self.path / "summary.json", json.dumps(as_json(summary), indent=2) + "\n")
        write_report(self.path)

    def fail(self, reason: str, exit_code: int = RunFailed.exit_code) -> None:
        """Emits why the run ended early and what is kept of it, and writes the report. `exit_code`: of who follows the run."""
        from edgelam_fl.telemetry.report.page import write_report

        state = self.path / "state.json"
        done = json.loads(state.read_text(encoding="utf-8"))["round"] if state.exists() else 0
        kept = (
            f"the adapter after round {done} is kept in {self.path.name}/adapter" if done else "no round was finished"
        )
        self.emit(RunFailure(reason=from_home(reason), kept=kept, exit_code=exit_code))
        write_report(self.path)
