"""One task of a run as a process (`python -m edgelam_fl.federation.task_process KIND OPTIONS`): a ServerApp or a simulation.

The task's token comes through standard input, never as an argument: every user of a machine sees arguments. Knows two of
Flower's commands, which do the work.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable

from edgelam_fl.federation.environment import unusable_proxies


def main() -> None:
    """Runs the task to its end."""
    kind, *options = sys.argv[1:]
    for proxy in unusable_proxies(os.environ, importlib.util.find_spec("socksio") is not None):
        print(f"{proxy} names a SOCKS proxy and the package socksio is not installed: it is not used", file=sys.stderr)
        del os.environ[proxy]
    token = sys.stdin.read()
    command = {"flwr-serverapp": _serverapp, "flwr-simulation": _simulation}[kind]()
    sys.argv = [kind, *options, "--token", token]  # of this interpreter alone: the system keeps the first ones
    command()


def _serverapp() -> Callable[[], None]:
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    return flwr_serverapp


def _simulation() -> Callable[[], None]:
    from flwr.simulation.app import flwr_simulation

    return flwr_simulation


if __name__ == "__main__":
    main()
