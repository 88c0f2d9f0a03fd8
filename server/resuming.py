"""How a run goes on after its ServerApp died or the run failed: from which checkpoint, with which settings, and what is refused.

Knows the run's folder and its events; the checkpoint itself is read by `server.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.files import is_held
from edgelam_fl.model.generation import GENERATION
from edgelam_fl.model.identity import difference
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import EVENTS_FILE, Event, PlanMade, RunStarted, of_kind, read_events
from edgelam_fl.telemetry.summary import finished_rounds, is_training_round, run_state
from server.checkpoint import Saved, load_newest, newest_round
from server.checks import check_changes
from server.run_folder import versions


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """A run that can go on."""

    config: RunConfig
    name: str
    """The name by which nodes know the run; "": they do not know it yet."""
    saved: Saved | None
    """The checkpoint that it goes on from; None: no round was finished, and it begins again."""
    problem: str
    """Why newer checkpoints were passed over; "": none was."""
    attempts: int
    """The attempts at the next round that nodes may know: a job of the same name must not be handed over again."""
    nodes: frozenset[str]
    """The nodes that the last finished round had; they are waited for a little."""

    @property
    def round(self) -> int:
        """Returns the last finished round."""
        return self.saved.state.round if self.saved is not None else 0

    def check_model(self, spec: RunSpec) -> None:
        """Raises ModelError if the run trained on another model than its configuration names now."""
        if self.saved is None:
            return
        then, now = (
            {name: sha for name, sha in files.items() if name != GENERATION}
            for files in (self.saved.model, spec.source.files)
        )
        if changes := difference(now, then):
            raise ModelError(
                f"the run trained on another model than {spec.source.name} is now: {changes}. It goes on with the same files alone"
            )


def check_can_resume(folder: Path) -> None:
    """Raises ConfigError for a folder that is no run's, and for a run that is alive or done. Reads no checkpoint."""
    if not (folder / EVENTS_FILE).is_file() or not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{folder} is not a run's folder (no {EVENTS_FILE}, no config.toml): --resume takes that of a run that ended early"
        )
    if is_held(folder):
        raise ConfigError(f"the run in {folder} is alive: `edgelam top {folder}` shows it")
    if run_state(read_events(folder / EVENTS_FILE)) == "done":
        raise ConfigError(
            f"the run in {folder} is done, so there is nothing to go on with: `edgelam report {folder}` shows its result. A new run trains "
            f"its adapter further with --set model.adapter={folder}"
        )


def resumption(folder: Path, overrides: str | list[str] = "", *, begins_again: bool = False) -> Resumption:
    """Reads how the run in `folder` goes on. Changes nothing.

    overrides: as in `edgelam run --set`. begins_again: a run without a finished round begins again, instead of being refused.
    Raises ConfigError by name: no whole checkpoint, another version's, keys that may not change.
    """
    events = list(read_events(folder / EVENTS_FILE))
    began = list(of_kind(events, RunStarted))[-1:]
    if begins_again and not newest_round(folder):
        text, saved, problem = (folder / "config.toml").read_text(encoding="utf-8"), None, ""
        wrote, name = (began[0].versions, began[0].name_at_nodes) if began else ({}, "")
    else:
        saved, problem = load_newest(folder)
        text, wrote, name = saved.config, saved.versions, saved.run
    mine, theirs = versions()["edgelam-fl"], wrote.get("edgelam-fl", "")
    if theirs and theirs != mine:
        raise ConfigError(
            f"{folder} is the folder of a run of edgelam-fl {theirs}, and this is {mine}: install that version here and on the nodes "
            f"to go on. `edgelam report`, `edgelam export` and `edgelam chat` take it as it is"
        )
    then = parse_run_file(text, source=f"{folder}'s checkpoint")
    config = parse_run_file(text, source=f"{folder}'s checkpoint", overrides=overrides)
    check_changes(then, config)
    number = (saved.state.round if saved is not None else 0) + 1
    return Resumption(
        config=config, name=name, saved=saved, problem=problem, attempts=_attempts(events, number), nodes=_nodes(events)
    )


def _nodes(events: Sequence[Event]) -> frozenset[str]:
    last = [done for done in finished_rounds(events) if is_training_round(done)][-1:]
    return frozenset(node.name for done in last for node in (*done.devices, *done.hosts))


def _attempts(events: Sequence[Event], number: int) -> int:
    return max((plan.attempt for plan in of_kind(events, PlanMade) if plan.round == number), default=0)
