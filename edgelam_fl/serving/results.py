"""Opens a run's folder for later commands: its configuration, its adapter and what its base model was. Reads no tensor.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.config import RunConfig, read_run_file
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.generation import GENERATION
from edgelam_fl.model.identity import difference
from edgelam_fl.model.source import ModelSource
from edgelam_fl.telemetry.events import EVENTS_FILE, Event, read_events
from edgelam_fl.telemetry.summary import Summary, read_summary

BASE_MODEL = "base_model.json"  # of a run's folder: the identity of the model that the run trained on


@dataclass(frozen=True)
class Result:
    """A run's folder that has an adapter."""

    folder: Path
    config: RunConfig

    @property
    def adapter(self) -> Path:
        """The adapter after the last finished round, in peft's format."""
        return self.folder / "adapter"

    @property
    def summary(self) -> Summary:
        """The run in numbers: perplexity before and after per device, bytes, seconds. Raises DataError while the run goes on."""
        return read_summary(self.folder / "summary.json")

    def events(self) -> Iterator[Event]:
        """Yields all that happened, oldest first."""
        return read_events(self.folder / EVENTS_FILE)

    def check_base(self, source: ModelSource) -> None:
        """Raises ModelError if the run trained on another model than `source`: its adapter would fit in shape alone.

        How answers end may be set anew after a run (generation_config.json). Folders of older versions do not say what the
        model was.
        """
        try:
            files = json.loads((self.folder / BASE_MODEL).read_text(encoding="utf-8"))["files"]
            then, now = (
                {name: str(sha) for name, sha in of.items() if name != GENERATION} for of in (files, source.files)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return
        if changes := difference(now, then):
            raise ModelError(
                f"{self.folder} was trained on another model than {source.name} is now: {changes}. Set model.name in its config.toml "
                f"to the model of then, or run again"
            )


def open_result(folder: Path) -> Result:
    """Opens a run's folder. Raises ConfigError if the folder is not a run's, or the run has not finished a round."""
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is not a run's folder: it has no config.toml")
    result = Result(folder, read_run_file(folder / "config.toml"))
    if not all((result.adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise ConfigError(
            f"{folder} has no adapter: the run has not finished a round; `edgelam report {folder}` reports on it"
        )
    return result
