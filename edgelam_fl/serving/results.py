"""Opens a run's folder for later commands: its configuration and its adapter. Imports no torch, reads no tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.config import RunConfig, read_run_file
from edgelam_fl.errors import ConfigError


@dataclass(frozen=True)
class Result:
    """A run's folder that has an adapter."""

    folder: Path
    config: RunConfig

    @property
    def adapter(self) -> Path:
        """The adapter after the last finished round, in peft's format."""
        return self.folder / "adapter"


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
