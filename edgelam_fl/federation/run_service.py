"""The server's side of looking after runs from anywhere: lists them, hands out what they said, stops them.

Handlers take and return plain dicts with an HTTP status; whoever listens mounts them, for the operator alone. Knows Flower's state
of the SuperLink by a few of its methods; knows neither HTTP nor tokens, and not what a run does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgelam_fl.bounds import Bounds
from edgelam_fl.errors import RunFailed, UsageError, nearest
from edgelam_fl.telemetry.events import EVENTS_FILE, read_piece
from edgelam_fl.telemetry.progress import read_progress
from edgelam_fl.telemetry.run_folder import RunLine, is_alive, is_run_folder, run_folders, run_line
from edgelam_fl.trust.join_service import Answer, answered

LIST_RUNS, READ_RUN, STOP_RUN = "list-runs", "read-run", "stop-run"
MOST_LISTED = 100
"""Runs in a list, the newest ones."""
_TRAINING = ("run", "resume")
_FINISHED = "finished"


@dataclass(frozen=True)
class RunService:
    """Answers the operator's questions about the runs of one SuperLink. All methods may be called from several threads at a time."""

    links: Any
    """Flower's state of the SuperLink."""
    bounds: Bounds
    """Where runs have their folders."""

    @property
    def handlers(self) -> Mapping[str, Callable[[Mapping[str, Any]], Answer]]:
        """Returns what answers each request, by its name."""
        made = {LIST_RUNS: self._list, READ_RUN: self._read, STOP_RUN: self._stop}
        return {name: partial(answered, handle, declined=409) for name, handle in made.items()}

    def _list(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the newest runs, those that have no folder first, and how many older ones are left out."""
        folders = self._folders()
        unseen = [
            self._unseen(folder, run)
            for folder, run in self._known().items()
            if not is_run_folder(folder) and (run.status.status != _FINISHED or not run.running_at)
        ]
        shown = folders[: max(0, MOST_LISTED - len(unseen))]
        lines = [*unseen[-MOST_LISTED:], *(run_line(folder, self._name(folder)) for folder in shown)]
        return {"runs": [asdict(line) for line in lines], "left_out": len(folders) + len(unseen) - len(lines)}

    def _read(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the next lines of a run's events, where its round stands, and whether a process works on it."""
        folder = self._place(asked)
        if not is_run_folder(folder):
            raise UsageError(self._unknown(folder))
        piece = read_piece(folder / EVENTS_FILE, _number(asked, "part", 1), _number(asked, "offset", 0))
        now = {"alive": is_alive(folder), "progress": read_progress(folder)}
        return {**asdict(piece), "name": self._name(folder), **now}

    def _stop(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Has Flower stop a run. Raises RunFailed for one that does not go on."""
        folder = self._place(asked)
        run = self._known().get(folder)
        if run is None and not is_run_folder(folder):
            raise UsageError(self._unknown(folder))
        if run is None or run.status.status == _FINISHED or not self.links.stop_run(run.run_id):
            raise RunFailed(f"there is nothing to stop: run {self._name(folder)} is {run_line(folder).state}")
        return {"name": self._name(folder)}

    def _known(self) -> dict[Path, Any]:
        """Returns the runs that Flower knows by their folders: of several in one folder, as of a run that went on, the newest."""
        found = {}
        for run in self.links.get_run_info(order_by="pending_at"):
            given = {key: str(value) for key, value in run.override_config.items()}
            if given.get("command", "run") in _TRAINING:
                found[self.bounds.run_folder(given.get("out", ""), f"flwr-{run.run_id}").resolve()] = run
        return found

    def _folders(self) -> list[Path]:
        """Returns the folders of runs on this machine, the newest first."""
        if self.bounds.run is not None:
            return [self.bounds.run.resolve()]
        return run_folders(self._root) if self._root != Path("/") else list(filter(is_run_folder, self._known()))

    @property
    def _root(self) -> Path:
        return self.bounds.runs.resolve()

    def _place(self, asked: Mapping[str, Any]) -> Path:
        """Returns the folder of the run that was asked for. Raises UsageError for a name that leads out of the folder of runs."""
        if self.bounds.run is not None:
            return self.bounds.run.resolve()
        name = asked.get("run")
        if not isinstance(name, str) or not name:
            raise UsageError("run must be the name of a run")
        return self.bounds.check_in_runs(self._root / name, "run")

    def _name(self, folder: Path) -> str:
        return str(folder.relative_to(self._root)) if folder.is_relative_to(self._root) else str(folder)

    def _unseen(self, folder: Path, run: Any) -> RunLine:
        """Returns the line of a run that has no folder yet, or ended before its ServerApp began."""
        state = "never begun" if run.status.status == _FINISHED else "starting"
        return RunLine(
            run=self._name(folder), state=state, round=0, rounds=None, began=None, seconds=None, note=run.status.details
        )

    def _unknown(self, folder: Path) -> str:
        names = [self._name(known) for known in self._folders()]
        hint = f"; {nearest(self._name(folder), names)}" if names else ""
        return f"this server has no run {self._name(folder)}{hint}"


def _number(asked: Mapping[str, Any], key: str, default: int) -> int:
    value = asked.get(key, default)
    if not isinstance(value, int):
        raise UsageError(f"{key} must be a number")
    return value
