"""Runs a federation from a run file: on a server, or on this machine as processes, and shows the run as it goes.

Knows processes, events and the run's folder; knows neither what the nodes compute nor what the server decides.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from edgelam_fl.config import RunConfig, changed_keys, toml_value
from edgelam_fl.errors import INTERRUPTED, ConfigError, RunFailed
from edgelam_fl.federation.before import (
    before_words,
    check_folder,
    check_room,
    check_run_file,
    check_steps,
    first_example,
    resolved_of,
)
from edgelam_fl.federation.data_check import check_files, look_into_files
from edgelam_fl.federation.flower_app import app_module
from edgelam_fl.federation.local import LocalFederation, await_result, local_federation, numbered
from edgelam_fl.federation.operator import Operator
from edgelam_fl.federation.server_probe import check_server_answers
from edgelam_fl.federation.submission import Submission
from edgelam_fl.federation.template import warm_template
from edgelam_fl.files import now_in_a_name, write_atomically
from edgelam_fl.plan.fronts import with_auto_front
from edgelam_fl.plan.layout import local_hosts
from edgelam_fl.plan.spec import RunSpec, model_of
from edgelam_fl.tasks.named import local_data
from edgelam_fl.telemetry.console import RunView
from edgelam_fl.telemetry.events import EVENTS_FILE, Event, EventTail, RoundDone, RoundProgress, RunFailure
from edgelam_fl.telemetry.human import human_seconds
from edgelam_fl.telemetry.run_folder import kept, way_on
from edgelam_fl.telemetry.summary import Summary, build_summary, read_summary
from edgelam_fl.telemetry.summary_words import summary_table
from edgelam_fl.telemetry.waiting import waiting

_LOCAL = "local.json"  # in the folder of a run of this machine alone: its data
_WAYS_OUT = (
    ". Two ways out: start one with `edgelam server` and let nodes join with `edgelam client`, or let this machine play all "
    "parts: add --data FILE for each device"
)


def check_run(
    config: RunConfig, name: str, out: Path | None, operator: Operator | None = None, devices: Sequence[str] = ()
) -> Path:
    """Raises UsageError for what is wrong with a run file, before anything starts. Returns the run's folder, still absent.

    name: replaces {name} in `out`, or in run.out if `out` is None. operator: of the server that the run is for, below whose
    folder for runs it gets its own; strategies that are not built in are then left to the server's check, and nothing is
    imported here for them. None: the run takes place on this machine alone. devices: the names of those that take part, if they are known.
    """
    check_run_file(config, here=operator is None, devices=devices)
    return new_folder(config, name, out, operator)


def new_folder(config: RunConfig, name: str, out: Path | None, operator: Operator | None = None) -> Path:
    """Returns the folder of a new run, still absent. The arguments are those of `check_run`. Raises ConfigError if it cannot be."""
    pattern = str(out) if out else config.run.out
    folder = Path(pattern.replace("{name}", name).replace("{time}", now_in_a_name())).expanduser().absolute()
    if operator is not None:
        folder = _on_server(folder, operator.runs(), is_chosen=out is not None)
    check_folder(folder, makes=operator is None)
    return folder


# ---------------------------------------------------------------- on a server


def _on_server(folder: Path, runs: Path, *, is_chosen: bool) -> Path:
    """Returns the run's folder on the server's machine: `folder` if it is below `runs`, else one of the same name there.

    is_chosen: the user named this very folder, so that no other will do. Raises ConfigError if it cannot be.
    """
    if runs in folder.parents:
        return folder
    if is_chosen:
        raise ConfigError(
            f"--out {folder} is outside of {runs}, where this server keeps runs: give a folder below, leave --out away, or start "
            f"the server with `edgelam server --runs DIR`"
        )
    return runs / folder.name


def run_on_server(console: Console, config: RunConfig, folder: Path, operator: Operator, insecure: bool) -> int:
    """Runs on the nodes that have joined the operator's server, and shows the run until it ends; returns the exit code."""
    check_server_answers(operator, insecure, _WAYS_OUT)
    view, source = _view_of(console, config), model_of(config)
    for line in before_words(RunSpec(with_auto_front(config, source), source), (), ()):
        view.say(line)
    return follow(console, view, config, folder, operator)


def resume_on_server(console: Console, run: Path, overrides: list[str], operator: Operator, insecure: bool) -> int:
    """Goes on with a run at the operator's server, and shows it until it ends; returns the exit code.

    run: its folder, or the name of it below the server's folder for runs.
    """
    folder = run.absolute() if run.is_dir() else operator.runs() / run
    resuming = app_module("server.resuming")
    resuming.check_can_resume(folder)
    config = resuming.resumption(folder, overrides).config
    check_server_answers(operator, insecure, _WAYS_OUT)
    return follow(console, _view_of(console, config), config, folder, operator, resumed=overrides)


def leave_on_server(console: Console, config: RunConfig, folder: Path, operator: Operator, insecure: bool) -> int:
    """Submits the run and prints how to follow and to stop it, and nothing else; it goes on without this command."""
    check_server_answers(operator, insecure, _WAYS_OUT)
    submission = Submission(operator)
    with waiting(Console(stderr=True), "handing the run to Flower"):
        run_id = submission.submit(config, folder)
    lines = [f"Flower run {run_id}; folder {folder}, on the server's machine", "", *submission.how_to(folder)]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    return 0


def _view_of(console: Console, config: RunConfig) -> RunView:
    return RunView(console, config.federation.rounds, config.federation.local_steps)


# ---------------------------------------------------------------- on this machine


def run_here(
    console: Console,
    config: RunConfig,
    folder: Path,
    data: Sequence[Path],
    resumed: Sequence[str] | None = None,
    names: Sequence[str] = (),
    choices: Sequence[str] = (),
    eval_data: Sequence[Path] = (),
) -> int:
    """Runs a federation of separate processes on this machine, a device per file of `data`; returns the exit code.

    resumed: keys to set anew in a run that goes on, as in `edgelam run --set`; None: the run begins. names: of the devices; empty:
    `numbered`. choices: what is said of how the run file came about. eval_data: as of `eval_files`. Raises UsageError or
    EnvironmentProblem for what is wrong with the data, or with this machine, before anything starts.
    """
    view, names = _view_of(console, config), names or numbered(len(data))
    with waiting(console, "reading the data"):
        said = _looked_into(config, data, names, folder, eval_data)
    for line in [*choices, *said]:
        view.say(line)
    try:
        with ExitStack() as stack:
            with waiting(console, "starting Flower's SuperLink") as wait:
                here = stack.enter_context(local_federation(config, data, folder, wait.update, names, eval_data))
            view.say(f"started {here}")
            view.expect(node.name for node in here.nodes)
            files = {"data": [*map(_absolute, data)], "eval_data": [*map(_absolute, eval_data)]}
            kept_of_run = {**files, "names": list(names)}
            write_atomically(folder / _LOCAL, json.dumps(kept_of_run) + "\n")
            status = follow(console, view, here.config, folder, here.operator, here, resumed)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status == INTERRUPTED and folder.is_dir():
        console.print(kept(folder), soft_wrap=True, markup=False, highlight=False)
    return status


def _looked_into(
    config: RunConfig, data: Sequence[Path], names: Sequence[str], folder: Path, eval_data: Sequence[Path]
) -> list[str]:
    """Checks the data and the room for a run on this machine; returns what is said before it starts."""
    read, measured = ([local_data(file) for file in files] for files in (data, eval_data))
    check_files(config, read, measured)  # takes a moment, and finds most faults
    warm_template()  # it imports meanwhile
    source = model_of(config)
    spec = RunSpec(with_auto_front(config, source), source)
    seen = look_into_files(config, source, read, measured)
    check_steps(config, seen)
    check_room(resolved_of(spec, seen), folder, len(data), len(local_hosts(config)))
    changed = ", ".join(f"{key} = {toml_value(value)}" for key, value in changed_keys(config).items())
    said = [*before_words(spec, seen, names), f"other than the defaults: {changed or 'nothing'}"]
    return [*said, *first_example(seen, config.model.name)]


def ran_here(folder: Path) -> bool:
    """Returns whether the run in a folder was one of this machine alone."""
    return (folder / _LOCAL).is_file()


def resume_here(console: Console, folder: Path, overrides: list[str]) -> int:
    """Goes on with a run of this machine alone, with the data that it began with; returns the exit code."""
    resuming = app_module("server.resuming")
    resuming.check_can_resume(folder)
    config = resuming.resumption(folder, overrides).config
    began = json.loads((folder / _LOCAL).read_text(encoding="utf-8"))
    data, eval_data = ([*map(Path, began.get(kind, ()))] for kind in ("data", "eval_data"))
    names = began.get("names") or numbered(len(data))
    check_run_file(config, here=True, devices=names)
    return run_here(console, config, folder, data, overrides, names, eval_data=eval_data)


def _absolute(data: Path) -> str:
    """Returns a file's absolute path; a data set of a hub keeps its name."""
    return str(data.absolute() if data.exists() else data)


# ---------------------------------------------------------------- a run as it goes


def follow(
    console: Console,
    view: RunView,
    config: RunConfig,
    folder: Path,
    operator: Operator,
    local: LocalFederation | None = None,
    resumed: Sequence[str] | None = None,
) -> int:
    """Submits the run and shows its events until it ends; returns the exit code.

    local: the federation's processes if they are this command's, which looks after them. resumed: as for `run_here`. Raises
    RunFailed with the run's own reason.
    """
    submission = Submission(operator)
    with waiting(console, "handing the run to Flower"):
        if resumed is None:
            run_id = submission.submit(config, folder)
        else:
            run_id = submission.submit(None, folder, "resume", overrides=resumed)
    view.say(f"Flower run {run_id}; folder {folder}")
    tails = {node.name: EventTail(node.state / EVENTS_FILE) for node in (local.nodes if local else [])}

    def meanwhile() -> bool:
        """Shows the nodes' own events and looks after the processes; true if a node was heard."""
        news = [(event, name) for name, tail in tails.items() for event in tail.poll()]
        for event, name in news:
            view.feed(event, name)
        if local:
            for what in local.watch():
                view.say(what)
        view.tick()
        return bool(news)

    can_go_on, seen = resumed is not None, list[Event]()
    try:
        with view:
            for event in submission.events(meanwhile=meanwhile, say=view.say):
                view.feed(event)
                if not submission.is_here and not isinstance(event, RoundProgress):
                    seen.append(event)
                can_go_on = can_go_on or isinstance(event, RoundDone)
                if isinstance(event, RunFailure):
                    how = f". {way_on(folder, '' if local else submission.options)}" if can_go_on else ""
                    end = "was stopped" if event.exit_code == INTERRUPTED else "failed"
                    raise RunFailed(f"the run {end}: {event.reason}; {event.kept}{how}", event.exit_code)
    except KeyboardInterrupt:
        console.print("stopping the run", soft_wrap=True)
        try:
            with waiting(console, "telling Flower to stop the run"):
                submission.stop()
        except RunFailed as error:
            console.print(str(error), soft_wrap=True, markup=False, highlight=False)
        if local is None:
            console.print(kept(folder, submission.options), soft_wrap=True, markup=False, highlight=False)
        return INTERRUPTED
    if submission.is_here:
        with waiting(console, "waiting for the report"):
            await_result(folder)
        _show_result(console, read_summary(folder / "summary.json"), view.elapsed_s)
        console.print(f"run: {folder}\npage: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    else:
        _show_result(console, build_summary(seen), view.elapsed_s)
        console.print(f"run: {folder}, on the server's machine", highlight=False, soft_wrap=True)
    return 0


def _show_result(console: Console, summary: Summary, elapsed_s: float) -> None:
    """Shows what came of a run that is done. elapsed_s: since its command was typed."""
    console.print(summary_table(summary))
    own_s, all_s = human_seconds(summary.seconds), human_seconds(elapsed_s)
    console.print(f"time: {all_s} with start-up and waiting, {own_s} of them the run itself", highlight=False)
