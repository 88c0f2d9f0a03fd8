"""The run's folder: configuration, events, a checkpoint after each round, and what is left when the run ends."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path

from edgelam_fl.config import to_toml
from edgelam_fl.errors import ConfigError, ModelError, RunFailed
from edgelam_fl.files import from_home, is_full, replace_folder, say, share, sweep, write_atomically
from edgelam_fl.model.adapter import Adapter, adapter_shapes, write_peft_folder
from edgelam_fl.model.base_names import FP32_BYTES
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.companions import add_card, add_texts
from edgelam_fl.serving.model_card import model_card
from edgelam_fl.serving.results import BASE_MODEL
from edgelam_fl.serving.trained_on import TrainedOn, trained_on
from edgelam_fl.telemetry.events import (
    EVENTS_BYTES,
    EVENTS_FILE,
    TIMELINES_BYTES,
    TIMELINES_FILE,
    Event,
    EventLog,
    RoundProgress,
    RunDone,
    RunFailure,
    as_line,
    mend_log,
    read_events,
)
from edgelam_fl.telemetry.progress import clear_progress, write_progress
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.summary import build_summary, finished_rounds, steps_of
from edgelam_fl.telemetry.trackers import Trackers
from server.checkpoint import Saved, newest_round, save, size_bytes, sweep_checkpoints

_SHARED = 0o755  # of adapters, which people hand on: the run's folder around them is its owner's alone
_REPORT_BYTES, _RESERVE_BYTES = 2_000_000, 64_000
_VERSIONED = ("edgelam-fl", "flwr", "torch", "transformers", "peft", "grpcio")


@cache
def versions() -> Mapping[str, str]:
    """Returns the installed versions of the packages that a run depends on, by name."""
    return {package: version(package) for package in _VERSIONED}


class RunFolder:
    """Writes everything that a run leaves behind: `checkpoints/` to go on from, and for its users `adapter/`, the newest result."""

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
        self._open_logs()

    @classmethod
    def begun_again(cls, path: Path, spec: RunSpec) -> RunFolder:
        """Opens the folder of a run that has not finished a round, and begins again: its events stay, nothing else does."""
        sweep(path)
        sweep_checkpoints(path)
        mend_log(path / EVENTS_FILE, 0)
        (path / "config.toml").unlink(missing_ok=True)
        return cls(path, spec)

    @classmethod
    def reopened(cls, path: Path, spec: RunSpec, saved: Saved) -> RunFolder:
        """Opens the folder of a run that goes on from a checkpoint of it: removes what its end left half-done, mends what came after
        the checkpoint, and emits the events that were still to come.
        """
        folder = cls.__new__(cls)
        folder.path, folder._spec = path, spec
        sweep(path)
        sweep_checkpoints(path)
        mend_log(path / EVENTS_FILE, saved.events_bytes)
        folder._open_logs()
        write_atomically(path / "config.toml", to_toml(spec.config))  # of keys that may change
        folder.export(saved.state.adapter, saved.state.exports())
        known = [as_line(event) for event in read_events(path / EVENTS_FILE)]
        for event in saved.closing:
            if as_line(event) not in known:
                folder.emit(event)
        return folder

    def settle(self, spec: RunSpec) -> None:
        """Has checkpoints hold what was decided since the run began: from one of them, the run goes on with the same."""
        self._spec = spec

    def _open_logs(self) -> None:
        clear_progress(self.path)  # of a process that was killed
        self._log = EventLog(self.path / EVENTS_FILE, EVENTS_BYTES, keeps_all=True)
        self.timelines = EventLog(self.path / TIMELINES_FILE, TIMELINES_BYTES)
        config = self._spec.config
        steps = sum(map(steps_of, finished_rounds(read_events(self._log.path)))) if config.run.report_to else 0
        self._trackers = Trackers(config.run.report_to, self.path, config.model_dump(mode="json"), self._log, steps)

    def emit(self, event: Event) -> None:
        """Writes an event, and hands it to the run's trackers."""
        self._log(event)
        self._trackers(event)

    def tell(self, progress: RoundProgress | None) -> None:
        """Puts where a round stands into the folder, for whoever follows the run; None: nobody plays."""
        if progress is None:
            clear_progress(self.path)
        else:
            write_progress(self.path, progress)
            self._trackers(progress)

    def round_bytes(self) -> int:
        """Returns the room on the disk that a round needs at its end: for two checkpoints with what is made of them, and a report."""
        made = [file for name in ("adapter", "adapters") for file in (self.path / name).rglob("*") if file.is_file()]
        size = size_bytes(self.path) + sum(file.stat().st_size for file in made)
        if not size:
            lora = self._spec.config.lora
            rank = max([lora.rank, *lora.ranks.values()])
            shapes = adapter_shapes(self._spec.source, lora.targets, rank, self._spec.kind).values()
            size = 2 * FP32_BYTES * sum(map(math.prod, shapes))
        report = self.path / "report.html"
        return 2 * size + (report.stat().st_size if report.exists() else _REPORT_BYTES) + _RESERVE_BYTES

    def checkpoint(self, saved: Saved) -> None:
        """Commits all that the run needs to go on, then replaces the adapter that users see."""
        saved = replace(
            saved,
            config=to_toml(self._spec.config),
            model=self._spec.source.files,
            events_bytes=self._log.sync(),
            versions=versions(),
        )
        save(self.path, saved)
        self.export(saved.state.adapter, saved.state.exports())

    def export(self, adapter: Adapter, own: Mapping[str, Adapter]) -> None:
        """Replaces `adapter/`, and `adapters/` if devices have tensors of their own: each as a whole, in one step.

        own: per device, these tensors; empty: there is no `adapters/` then. An empty adapter changes nothing.
        """
        if not adapter:
            return
        if own:
            self._replace("adapters", {Path(name): {**adapter, **tensors} for name, tensors in own.items()})
        else:
            shutil.rmtree(self.path / "adapters", ignore_errors=True)  # of rounds after the best one
        self._replace("adapter", {Path(): adapter})

    def _replace(self, name: str, exports: Mapping[Path, Adapter]) -> None:
        """Replaces a folder of this one by a new one with these adapters, by their paths in it."""
        part = self.path / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            for place, tensors in exports.items():
                self._write_adapter(tensors, part / place)
            share(part, _SHARED)
            replace_folder(part, self.path / name)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def _write_adapter(self, tensors: Adapter, folder: Path) -> None:
        lora = self._spec.config.lora
        write_peft_folder(
            tensors,
            folder,
            reference=self._spec.source.reference,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            classes=self._spec.config.task.classes,
            values=self._spec.values,
            kind=self._spec.kind,
            trained_on=self._base.as_json(),
        )

    @cached_property
    def _base(self) -> TrainedOn:
        return trained_on(self._spec.source)

    def _accompany(self) -> None:
        """Puts the tokenizer, the generation settings and the model card beside the adapter, if there is one.

        A disk may be full, or a file of the model damaged: the run is over all the same.
        """
        adapter = self.path / "adapter"
        if not adapter.is_dir():
            return
        try:
            card = model_card(self._spec.config, self._base, list(read_events(self._log.path)), "peft", whole=False)
            add_texts(self._spec.source, adapter)
            add_card(card, adapter)
            share(adapter)
        except (OSError, ModelError) as error:
            say(f"{adapter} has no model card ({error}); `edgelam export {self.path} --to peft` makes one")

    def finish(self) -> None:
        """Writes summary.json and report.html from the events."""
        from edgelam_fl.telemetry.report.page import write_report

        self._trackers.close()
        self.emit(RunDone(summary="summary.json"))
        try:
            summary = build_summary(list(read_events(self._log.path)))
            write_atomically(self.path / "summary.json", json.dumps(as_json(summary), indent=2) + "\n")
            self._accompany()  # before the report: whoever follows the run takes that for its end
            write_report(self.path)
        except OSError as error:
            if not is_full(error):
                raise
            say(
                f"the disk is full: the run is done, and `edgelam report {self.path}` makes its page once there is room"
            )

    def fail(self, reason: str, exit_code: int = RunFailed.exit_code) -> None:
        """Emits why the run ended early and what is kept of it, and writes the report. `exit_code`: of who follows the run."""
        from edgelam_fl.telemetry.report.page import write_report

        done = newest_round(self.path)
        kept = (
            f"the adapter after round {done} is kept in {self.path.name}/adapter" if done else "no round was finished"
        )
        self._trackers.close(failed=True)
        self.emit(RunFailure(reason=from_home(reason), kept=kept, exit_code=exit_code))
        self._accompany()
        with suppress(OSError):  # the reason is out; on a full disk there is no room for the page
            write_report(self.path)
