"""The run file: its keys and their rules, read from and written as TOML."""

from edgelam_fl.config.schema import (
    FederationSection,
    ModelSection,
    OptimizerSection,
    PrivacySection,
    RunConfig,
    Section,
    TaskSection,
    WirelessSection,
    WireSection,
    most_read_by_hosts,
    share_after,
)
from edgelam_fl.config.toml import (
    changed_keys,
    known_keys,
    parse_run_file,
    parse_toml,
    read_run_file,
    to_toml,
    toml_value,
    without_home,
)

__all__ = [
    "FederationSection",
    "ModelSection",
    "OptimizerSection",
    "PrivacySection",
    "RunConfig",
    "Section",
    "TaskSection",
    "WireSection",
    "WirelessSection",
    "changed_keys",
    "known_keys",
    "most_read_by_hosts",
    "parse_run_file",
    "parse_toml",
    "read_run_file",
    "share_after",
    "to_toml",
    "toml_value",
    "without_home",
]
