"""Commands for a run's folder: report, compare, export, push, chat. They parse and print; the work is done by the modules that they import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgelam_fl.cli.options import (
    OPERATOR_FOLDER,
    DeviceOption,
    InsecureOption,
    JsonOption,
    OperatorOption,
    RunArgument,
    console,
    messages,
    say,
)
from edgelam_fl.errors import ConfigError


def report(
    folder: RunArgument,
    ask: Annotated[
        list[str],
        typer.Option(
            "--ask",
            metavar="TEXT",
            help="Put answers to this question, before and after the run, onto the page; may be repeated.",
        ),
    ] = [],  # noqa: B006 - typer reads the default
) -> None:
    """Draws a run's page and table again, also if the run failed or is still going.

    --ask needs the run's model on this machine. The questions and answers stay in RUN/answers.json, and so on the page.
    """
    from edgelam_fl.telemetry.events import EVENTS_FILE, read_events
    from edgelam_fl.telemetry.report.incidents import failure
    from edgelam_fl.telemetry.report.page import write_report
    from edgelam_fl.telemetry.run_folder import find_run, kept, state_now
    from edgelam_fl.telemetry.summary import build_summary
    from edgelam_fl.telemetry.summary_words import summary_table
    from edgelam_fl.telemetry.verdict import verdict
    from edgelam_fl.telemetry.waiting import waiting

    folder = find_run(folder)
    events = list(read_events(folder / EVENTS_FILE)) if (folder / EVENTS_FILE).is_file() else []
    state = state_now(folder, events)
    if not events:
        say(f"{folder.absolute().name}: {state}; there is nothing to report on yet")
        return
    if ask:
        _ask(folder, ask)
    summary = build_summary(events, state, folder.absolute().name)
    console.print(summary_table(summary))
    say(verdict(summary))
    if state == "killed":
        say(f"its process ended without a last word. {kept(folder)}")
    for heading, text in failure(events):
        say(f"{heading.lower()}: {text}")
    with waiting(messages, "drawing the page"):
        page = write_report(folder)
    say(f"page: {page}")


ToOption = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="peft|merged|gguf",
        help="The adapter alone, merged into its base, or both for llama.cpp and Ollama.",
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="fp32|bf16|fp16", help="Of the weights, by default fp32; fp16: of --to gguf alone."
    ),
]
FrontOption = Annotated[
    Path | None,
    typer.Option(
        "--front",
        metavar="FILE",
        help="This device's own tensors, of a run with privacy.private_front or task.private_modules.",
    ),
]


def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN", help="The folders of two runs, or of up to eight.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Where the page goes; by default compare.html in the first run's folder."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Puts runs side by side: what they reached, what it cost, and the settings in which they differ.

    Prints a table and writes a page with their curves. Runs that failed or are still going can be compared too.
    """
    from edgelam_fl.telemetry.comparison import caution, comparison_json, comparison_table, read_runs
    from edgelam_fl.telemetry.report.compare_page import write_comparison
    from edgelam_fl.telemetry.run_folder import find_run

    runs = read_runs([find_run(folder) for folder in folders])
    if as_json:
        console.print_json(data=comparison_json(runs))
        return
    console.print(comparison_table(runs))
    if said := caution(runs):
        say(said)
    page = out or runs[0].folder / "compare.html"
    write_comparison(runs, page)
    say(f"page: {page}")


def _ask(folder: Path, questions: list[str]) -> None:
    from edgelam_fl.serving.before_after import answers_of, check_can_answer
    from edgelam_fl.serving.results import open_result
    from edgelam_fl.telemetry.report.answers import write_answers
    from edgelam_fl.telemetry.waiting import waiting

    result = open_result(folder)
    check_can_answer(result, questions)
    with waiting(messages, "asking, before and after the run"):
        answers = answers_of(result, questions)
    write_answers(folder, answers)
    for answer in answers:
        say(f"{answer.question}\n  before: {answer.before}\n  after:  {answer.after}")


def export(
    folder: RunArgument,
    to: ToOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A new folder; by default RUN/peft, RUN/merged or RUN/gguf."),
    ] = None,
    dtype: DtypeOption = "",
    front: FrontOption = None,
) -> None:
    """Writes a run's result in a form that other tools load without EdgeLAM-FL.

    peft: the adapter, a few MB, checked against its base. merged: a Hugging Face model folder. gguf: the merged model and the
    adapter as GGUF files, and a Modelfile for Ollama. Merging takes the whole model in memory, 4 bytes per weight, into the
    base as it was before any quantization. Each has a model card.
    """
    from edgelam_fl.telemetry.waiting import waiting

    with waiting(console, "exporting"):
        from edgelam_fl.serving.export import export as write
        from edgelam_fl.serving.results import open_result

        result = open_result(folder)
        made, how = write(result, to, out, dtype, front)
    say(f"wrote {made}; elsewhere:\n{how}")


def push(
    folder: RunArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The repository: OWNER/NAME on the hub.")],
    to: ToOption = "peft",
    public: Annotated[bool, typer.Option("--public", help="Anybody may read it; by default it is private.")] = False,
    dtype: DtypeOption = "",
    front: FrontOption = None,
) -> None:
    """Uploads a run's result to the Hugging Face hub, with its model card, as `edgelam export` writes it.

    Nothing else of the run leaves this machine: no data, no events, no names of nodes. The token is the one of `hf auth login` or
    HF_TOKEN. What is uploaded is listed first. A new repository is private.
    """
    from edgelam_fl.telemetry.waiting import waiting

    with waiting(messages, "exporting and uploading"):
        from edgelam_fl.serving.push import Upload
        from edgelam_fl.serving.push import push as upload
        from edgelam_fl.serving.results import open_result

        result = open_result(folder)
        place = upload(result, Upload(name, to, public, dtype, front), say)
    say(f"uploaded: {place}")


def chat(
    folder: RunArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="Ask this alone.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The longest answer.")] = 128,
    base: Annotated[bool, typer.Option("--base", help="The model without the run's adapter, to compare.")] = False,
    server: Annotated[
        str,
        typer.Option("--server", metavar="HOST:PORT", help="Answer over the hosts of the federation at this server."),
    ] = "",
    operator: OperatorOption = OPERATOR_FOLDER,
    device: DeviceOption = "auto",
    insecure: InsecureOption = False,
) -> None:
    """Answers questions with a run's result: the whole model on this machine, with the run's adapter.

    With --server the hosts of a federation compute the layers between: the bytes of the text stay here, and hosts can read its
    content as in training. This works on the server's machine. Answers are greedy: the same question gives the same words. With
    --prompt, only the answer is printed.
    """
    from edgelam_fl.files import keep_private
    from edgelam_fl.telemetry.waiting import waiting

    keep_private()
    with waiting(messages, "opening the run"):
        from edgelam_fl.model.source import find_model
        from edgelam_fl.serving.chat import check_can_talk, converse
        from edgelam_fl.serving.results import open_result

        result = open_result(folder)
        check_can_talk(result.config, prompt)
        if not base:
            result.check_base(find_model(result.config.model.name))
    if server and base:
        raise ConfigError(
            "--base and --server do not go together: the hosts hold the run's adapter; leave out --server"
        )
    if server:
        from edgelam_fl.federation.operator import Operator
        from edgelam_fl.federation.server_probe import check_server_answers

        asking = Operator(server, operator)
        check_server_answers(asking, insecure)
        with waiting(messages, "loading PyTorch"):
            from edgelam_fl.federation.remote import route_speaker
        with route_speaker(result, asking, messages, device) as speaker:
            converse(speaker, messages, prompt, max_tokens, tuned=True)
        return
    with waiting(messages, "loading the model"):
        from edgelam_fl.model.bases import working_chip
        from edgelam_fl.serving.generate import LocalSpeaker

        chip, _ = working_chip(device)
        local = LocalSpeaker(result.config.model, result.config.task, chip)
        if not base:
            local.put_on(result.adapter)
    converse(local, messages, prompt, max_tokens, tuned=not base)
