"""A run's folder as later commands find it: its configuration, its adapter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.config import RunConfig, read_run_file
from edgelam_fl.errors import ConfigError


@dataclass(frozen=True)
class Result:
    folder: Path
    config: RunConfig

    @property
    def adapter(self) -> Path:
        """The adapter after the last finished round, in peft's format."""
        return self.folder / "adapter"


def open_result(folder: Path) -> Result:
    """Raises ConfigError for a folder that is no run's, or of a run that has not finished a round."""
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no config.toml")
    result = Result(folder, read_run_file(folder / "config.toml"))
    if not all((result.adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise ConfigError(
            f"{folder} has no adapter: the run has not finished a round; `edgelam report {folder}` reports on it"
        )
    return result
