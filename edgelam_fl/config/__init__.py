"""The run file: its keys and their rules, read from and written as TOML."""

from edgelam_fl.config.schema import ModelSection, RunConfig, Section, TaskSection, WirelessSection, WireSection
from edgelam_fl.config.toml import known_keys, parse_run_file, read_run_file, to_toml, toml_value, without_home

__all__ = [
    "ModelSection",
    "RunConfig",
    "Section",
    "TaskSection",
    "WireSection",
    "WirelessSection",
    "known_keys",
    "parse_run_file",
    "read_run_file",
    "to_toml",
    "toml_value",
    "without_home",
]
