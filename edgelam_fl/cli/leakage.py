"""The command `edgelam leakage`: what a host could read at a run file's cut. Parses and prints; `serving.leakage` measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from edgelam_fl.cli.options import JsonOption, OfflineOption, RunFileArgument, SetOption, console, messages, say
from edgelam_fl.errors import ConfigError

if TYPE_CHECKING:
    from edgelam_fl.config import RunConfig
    from edgelam_fl.model.source import ModelSource
    from edgelam_fl.serving.leakage import MeasuredLeakage

DEFAULT_FRONT = 2
USUAL_FRONTS = (0, 1, 2, 4, 8, 16, 24)
KEPT_FROM = 10_000
"""Public tokens that a measurement needs so that later runs are judged by it: an attacker who learned from fewer reads less."""


def leakage(
    file: RunFileArgument,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="A device's data, as the private side. Without: a built-in text."),
    ] = None,
    cuts: Annotated[
        str,
        typer.Option(
            "--cuts", metavar="N,N,...", help="Layers in front to measure; by default the run's and some others."
        ),
    ] = "",
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=500, help="Public tokens that the attacker learns from; fewer are faster."
        ),
    ] = 20_000,
    overrides: SetOption = [],  # noqa: B006 - typer reads the default
    as_json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Measures what a host could read of your text at this model's cut, on this machine, in minutes; sends nothing.

    Plays an honest but curious host that has the public model and public text, by four attacks: nearest neighbour, a linear map, a
    small sequence network, and trying tokens one by one through the same layers (not for classifiers, whose states depend on the
    whole text). They show what can be read at least: a stronger attacker, or public text more like yours, reads more.
    """
    from edgelam_fl.config import read_run_file
    from edgelam_fl.model.source import find_model
    from edgelam_fl.plan.making import task_settings
    from edgelam_fl.tasks.data import pairs_by
    from edgelam_fl.tasks.kinds import values_of
    from edgelam_fl.tasks.named import local_data
    from edgelam_fl.telemetry.waiting import waiting

    config = read_run_file(file, overrides)
    if values_of(config.task.kind):
        raise ConfigError(
            f"edgelam leakage reads texts, and task.kind = {config.task.kind!r} learns from values: nothing is measured"
        )
    source = find_model(config.model.name)
    fronts = fronts_to_measure(config, source, cuts)
    if data is not None:  # before PyTorch is loaded, which takes seconds
        pairs_by(task_settings(config), local_data(data))
    with waiting(messages, "loading PyTorch") as status:
        from edgelam_fl.serving.leakage import built_in_texts, measure_leakage, public_texts, texts_of_file

        private = texts_of_file(data, config) if data is not None else None
        texts = built_in_texts() if private is None else (public_texts(private), private)
        own = set(fronts_of_run(config, source).values()) if config.split.hosts else set()
        at = min(own & set(fronts), default=DEFAULT_FRONT if DEFAULT_FRONT in fronts else fronts[-1])
        found = measure_leakage(source, fronts, at, texts, tokens, status.update)
    kept = keep(found)
    if as_json:
        say(json.dumps({**asdict(found), "kept": str(kept or "")}, indent=2))
        return
    console.print(_table(found, own))
    for line in [*_words(found, config, data), *_what_changes_it(found, config), _where_kept(found, kept)]:
        say(line)


def fronts_to_measure(config: RunConfig, source: ModelSource, cuts: str) -> list[int]:
    """Returns numbers of layers in front, rising. Raises ConfigError for one that leaves no layer to a host, or is no number."""
    most, named = source.num_layers - 1, fronts_of_run(config, source)
    for key, front in named.items():
        if front > most and config.split.hosts:
            raise ConfigError(
                f"{key} = {front} is outside the model: {source.name} has {source.num_layers} layers, and a host needs at least one of them"
            )
    if not cuts:
        return sorted({front for front in (*USUAL_FRONTS, *named.values()) if front <= most})
    try:
        chosen = sorted({int(part) for part in cuts.split(",")})
    except ValueError:
        chosen = [-1]
    if chosen[0] < 0 or chosen[-1] > most:
        raise ConfigError(
            f"--cuts {cuts!r} must be numbers of layers, 0 to {most} for {source.name}, as in --cuts 0,2,8"
        )
    return chosen


def keep(found: MeasuredLeakage) -> Path | None:
    """Keeps a measurement for later runs on this machine; None if the package has numbers of this model, or it was too short."""
    from edgelam_fl.privacy.known import shipped, store

    ours = any(known.digest == found.digest for known in shipped())
    return None if ours or found.public_tokens < KEPT_FROM else store(found.known())


# ---------------------------------------------------------------- what is printed


def fronts_of_run(config: RunConfig, source: ModelSource) -> dict[str, int]:
    """Returns the layers in front that a run's devices would keep, by key of the run file; empty if they are to be found yet."""
    split = config.split
    if not isinstance(split.fronts, str):
        return {"split.front": split.front} | {f"split.fronts.{name}": front for name, front in split.fronts.items()}
    from edgelam_fl.config import share_after
    from edgelam_fl.privacy.known import known_leakage

    known = known_leakage(source.name, source.leakage_key)
    front = known.front_for(share_after("auto", split.fronts, "a table")) if known else None
    return {} if front is None else {"split.fronts": front}


def _table(found: MeasuredLeakage, own: set[int]) -> Table:
    table = Table(title=f"Share of the tokens that a host reads, {found.model}", title_justify="left")
    table.add_column("layers in front")
    for heading in (
        "nearest\nneighbour",
        "linear\nmap",
        "sequence\nnetwork",
        "token by\ntoken",
        "among the\nfirst five",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for reading in found.readings:
        mark = "  <- this run" if reading.front in own else ""
        shares = (reading.nearest, reading.ridge, reading.inverter, reading.replay, reading.among_five)
        words = ("" if share is None else f"{100 * share:.1f} %" for share in shares)
        table.add_row(f"{reading.front}{mark}", *words, style="bold" if mark else "")
    return table


def _words(found: MeasuredLeakage, config: RunConfig, data: Path | None) -> Iterator[str]:
    from edgelam_fl.serving.leakage import BUILT_IN_TEXT, LEAST_TOKENS, MOST_TOKENS

    texts = found.private_texts
    yield f"private: {found.private_tokens:,} tokens of {data or f'a built-in text, {BUILT_IN_TEXT} (--data FILE: your own)'}"
    yield (
        f"  {texts.read:,} texts, {texts.cut:,} of them cut at {MOST_TOKENS} tokens; not read: {texts.short:,} shorter than {LEAST_TOKENS} tokens, "
        f"{texts.spare:,} that were not needed"
    )
    yield f"public: {found.public_tokens:,} tokens of {BUILT_IN_TEXT}, other ones; by chance {100 * found.chance:.1f} % would be read"
    yield f"with {found.shown_front} layers in front:"
    for text, read in found.examples:
        yield f"  private  {text}"
        yield f"  read     {read}"
    if not config.split.hosts:
        yield "split.hosts = 0: this run has no host, so nobody gets hidden states"


def _what_changes_it(found: MeasuredLeakage, config: RunConfig) -> Iterator[str]:
    """Says what a user can do, with the shares that were measured."""
    if not config.split.hosts:
        return
    now = found.reading(found.shown_front).best
    deeper = [reading for reading in found.readings if reading.front > found.shown_front and reading.best < now]
    if deeper:
        shares = ", ".join(f"{100 * reading.best:.0f} % with {reading.front}" for reading in deeper)
        yield f"more layers in front (split.front; they take memory and time on the device): {shares}"
    yield "all shares are the least: a host with more time, or with public text more like yours, reads more (PRIVACY.md)"
    yield "split.hosts = 0: each device trains the whole model, and only adapters leave it"
    yield "defences at the cut, with what they cost: docs/privacy.md"
    yield 'to refuse plans that leak more than a share: split.trust = "measured:0.2" in the run file, edgelam client --trust on a device'


def _where_kept(found: MeasuredLeakage, kept: Path | None) -> str:
    if kept:
        return f"kept in {kept}: --explain, split.trust and --trust go by it on this machine"
    if found.public_tokens < KEPT_FROM:
        return f"not kept for later runs: it learned from fewer than {KEPT_FROM:,} public tokens (--tokens)"
    return "not kept: --explain, split.trust and --trust go by the numbers that come with the package"
