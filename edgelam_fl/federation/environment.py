"""The environment of the processes that are started here: made from this process's own and not inherited as it is.

A shell's variables are meant for the shell's user. What stays is what says how to compute (threads, devices, caches, the hub
of models); proxies, locale, folders and terminals are set so that a process works the same from any shell. Knows no process.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgelam_fl.addresses import is_loopback
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import home_folder

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
"""Variables that name a proxy, in lower case; in upper case they mean the same."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WITHOUT_PROXY = (
    "no_proxy",
    "NO_PROXY",
    "no_grpc_proxy",
)  # gRPC reads the first and the last, Python's clients the others
_KEPT_OF_FLOWER = {"FLWR_HOME", "FLWR_LOG_LEVEL"}  # others open telemetry, other databases and other protocols
_DROPPED = {
    # they colour and wrap what is parsed or logged
    "FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES",
    "PYTHONIOENCODING",  # it would win over PYTHONUTF8
    "PYTHONINSPECT",  # a process that has ended would wait for input
    "RAY_ADDRESS",  # a simulation would join that cluster
}  # fmt: skip


def child_environment(*hosts: str) -> dict[str, str]:
    """Returns the environment of a process to be started.

    hosts: machines that are reached directly whatever proxies are set, beside this one; names or addresses without ports.
    Raises EnvironmentProblem if no folder for temporary files can be written.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED and not _is_flowers(name)}
    made = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # Flower's tools are found by name
        "LC_ALL": "C.UTF-8",
        "PYTHONUTF8": "1",
        "NO_COLOR": "1",
        "HOME": str(home_folder()),
        "TMPDIR": _temporary_folder(),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    return kept | made | without_proxy(os.environ, hosts)


def without_proxy(environment: Mapping[str, str], hosts: tuple[str, ...] = ()) -> dict[str, str]:
    """Returns the variables by which this machine and `hosts` are reached directly, with what `environment` says already."""
    named = [name.strip() for variable in _WITHOUT_PROXY for name in environment.get(variable, "").split(",")]
    every = [*named, *_LOOPBACK, *(host for host in hosts if not is_loopback(host))]
    direct = ",".join(dict.fromkeys(filter(None, every)))
    return dict.fromkeys(_WITHOUT_PROXY, "*" if "*" in named else direct)


def without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment for a process that reaches the server alone: Flower's client fails at a kind of proxy that it does
    not know (SOCKS), even if it would go around it.
    """
    return {name: value for name, value in environment.items() if name.lower() not in PROXIES}


def unusable_proxies(environment: Mapping[str, str], can_socks: bool) -> list[str]:
    """Lists the variables with a SOCKS proxy, unless Python's client of HTTP can use one: it fails at the first that it sees."""
    return [name for name in proxies_set(environment) if environment[name].startswith("socks") and not can_socks]


def check_interpreter(optimize: int) -> None:
    """Raises EnvironmentProblem for a Python that drops docstrings. `optimize`: as sys.flags has it."""
    if optimize > 1:
        raise EnvironmentProblem(
            "this Python drops docstrings (PYTHONOPTIMIZE=2 or python -OO), and without them transformers cannot be imported; "
            "unset PYTHONOPTIMIZE, or set it to 1"
        )


def proxies_set(environment: Mapping[str, str]) -> list[str]:
    """Lists the variables that name a proxy. Their values are for nobody: they may hold a password."""
    return [name for name in environment if name.lower() in PROXIES and environment[name]]


def settle_process() -> None:
    """Makes this process independent of its shell: its umask, its home folder, its way to itself, the characters it prints.

    Who else may read its files is left to the shell's umask; nobody else may change them, and it can read them itself.
    """
    before = os.umask(0o077)
    os.umask((before | 0o022) & 0o077)
    os.environ.update({"HOME": str(home_folder()), **without_proxy(os.environ)})
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows a question mark


def _is_flowers(name: str) -> bool:
    return name.startswith("FLWR_") and name not in _KEPT_OF_FLOWER


def _temporary_folder() -> str:
    try:
        return str(Path(tempfile.gettempdir()).absolute())
    except FileNotFoundError as error:
        raise EnvironmentProblem(
            f"no folder for temporary files can be written ({error}); set TMPDIR to one"
        ) from error
