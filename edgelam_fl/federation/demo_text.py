"""The demo of text: a small language model learns Python's standard library from its docstrings.

Knows its run file, data and questions; `federation.demo` runs it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from edgelam_fl.config import RunConfig
from edgelam_fl.federation.demo import Demo
from edgelam_fl.federation.template import in_fork
from edgelam_fl.tasks.docstrings import write_device_files
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


def _write_data(folder: Path, devices: int) -> tuple[Sequence[Path], str]:
    files = write_device_files(folder, devices)
    counts = ", ".join(f"{sum(1 for _ in file.open(encoding='utf-8'))}" for file in files)
    return files, f"docstrings of Python's standard library, other modules on each device: {counts} pairs"


def _show_result(console: Console, config: RunConfig, folder: Path, files: Sequence[Path]) -> None:
    _show_answers(console, config, folder, files[0])
    _show_ways_on(console, folder)


def _show_ways_on(console: Console, folder: Path) -> None:
    run = shlex.quote(str(folder))
    lines = [
        f"talk to it:          edgelam chat {run}",
        f"take it elsewhere:   edgelam export {run} --to peft",
        "with your own data:  edgelam init mine.toml --data FILE",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


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


TEXT = Demo(
    run_file=RUN_FILE,
    device="device",
    gathering="gathering docstrings",
    write_data=_write_data,
    show_result=_show_result,
    node_bytes=1100 << 20,
)
