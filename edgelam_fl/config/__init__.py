"""The run file: its keys and their rules, read from and written as TOML."""

from edgelam_fl.config.schema import Model, RunConfig, Section, Task, Wire, Wireless
from edgelam_fl.config.toml import known_keys, parse_run_file, read_run_file, to_toml, toml_value

__all__ = [
    "Model",
    "RunConfig",
    "Section",
    "Task",
    "Wire",
    "Wireless",
    "known_keys",
    "parse_run_file",
    "read_run_file",
    "to_toml",
    "toml_value",
]
