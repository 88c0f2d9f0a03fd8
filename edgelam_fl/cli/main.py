"""The entry of `edgelam`: its list of commands, and the one place where an error becomes a message and an exit code.

Imports nothing heavy, so that `--help` answers at once: a command imports what needs torch or Flower when it runs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption
from typer.main import get_command

from edgelam_fl import __version__
from edgelam_fl.cli import bench, examples, leakage, members, nodes, results, runs, watch
from edgelam_fl.cli.options import console, messages
from edgelam_fl.cli.usage import check_values, usage_words
from edgelam_fl.errors import INTERRUPTED, EdgelamError, EnvironmentProblem, UsageError
from edgelam_fl.federation.environment import check_interpreter, settle_process

app = typer.Typer(
    name="edgelam",
    help="Fine-tune a language model that no single device can train. Data files stay on their devices; what hosts can read is measured.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
_COMMANDS = (
    runs.init,
    runs.demo,
    nodes.doctor,
    watch.top,
    watch.runs,
    watch.log,
    watch.stop,
    runs.plan,
    leakage.leakage,
    runs.run,
    nodes.server,
    nodes.client,
    members.invite,
    members.nodes,
    members.revoke,
    bench.bench,
    examples.examples,
    results.report,
    results.compare,
    results.export,
    results.push,
    results.chat,
)
_LOG = logging.getLogger("edgelam_fl")


def _say_more(context: Any, option: Any, value: bool) -> bool:
    """Lets libraries and this program say more on stderr, and Flower's processes in their logs."""
    if value and not context.resilient_parsing:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
        _LOG.setLevel(logging.DEBUG)
        os.environ["FLWR_LOG_LEVEL"] = "DEBUG"
    return value


class _Command(TyperCommand):
    """A command that also takes -v, without a parameter of its function."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.params.append(
            TyperOption(
                param_decls=["-v", "--verbose"], is_flag=True, default=False, expose_value=False, callback=_say_more,
                help="Say more: messages of libraries, where in the program an error arose, and details in Flower's logs.",
            )
        )  # fmt: skip


for _command in _COMMANDS:
    app.command(cls=_Command)(_command)


def _version(value: bool) -> None:
    if value:
        console.print(f"edgelam-fl {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs `edgelam` with this process's arguments and ends the process."""
    run_commands(app, "edgelam")


def run_commands(app: typer.Typer, name: str) -> None:
    """Runs a command of `app` with this process's arguments and ends the process."""
    settle_process()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # systemd's way to say Ctrl-C
    sys.exit(exit_code(app, name, sys.argv[1:]))


def exit_code(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Runs a command of `app`, prints a foreseen error as one message and returns the exit code."""
    try:
        check_interpreter(sys.flags.optimize)
        command = get_command(app)  # once: it looks at all options of all commands
        check_values(command, arguments)
        status = command(args=list(arguments), prog_name=name, standalone_mode=False)
    except EdgelamError as error:
        _LOG.debug("where it arose:", exc_info=error)
        _say_error(name, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        messages.print(f"{name}: interrupted")
        return INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return INTERRUPTED
    except OSError as error:
        if not error.filename:
            raise
        _say_error(name, f"{error.filename}: {error.strerror}")
        return EnvironmentProblem.exit_code
    except Exception as error:
        words = usage_words(error)
        if words is None:
            raise
        _say_error(name, words)
        return UsageError.exit_code
    return int(status or 0)


def _say_error(name: str, words: str) -> None:
    text = words.replace("[", "\\[")
    messages.print(f"[bold red]{name}:[/bold red] {text}", highlight=False, soft_wrap=True)
