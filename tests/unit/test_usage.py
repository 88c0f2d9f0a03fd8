"""What is wrong with a command line comes as one line, whatever raised it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer

from edgelam_fl.cli.main import exit_code

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def read(
    file: Path,
    times: Annotated[int, typer.Option("--times", metavar="N")] = 1,
    loud: Annotated[bool, typer.Option("--loud")] = False,
) -> None:
    file.read_bytes()
    raise KeyError(times, loud)


@app.command()
def write() -> None:
    pass


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["read", "/nowhere/file"], 3, "it: /nowhere/file: No such file or directory"),
        (["read", "/nowhere/file", "--times", "--loud"], 2, "it: --times needs a value (N), and --loud stands in its place"),
        (["read", "/nowhere/file", "--times", "two"], 2, "it: invalid value for '--times': 'two' is not a whole number. (`it read --help` lists what it takes)"),
        (["raed"], 2, "it: no such command 'raed'. Did you mean 'read'? (`it --help` lists what it takes)"),
        (["write", "one"], 2, "it: got unexpected extra argument (one) (`it write --help` lists what it takes)"),
        (["write", "-loud"], 2, "it: no such option '-l'. Options of one word begin with two hyphens. (`it write --help` lists what it takes)"),
        (["read"], 2, "it: missing argument 'FILE'. (`it read --help` lists what it takes)"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(
    words: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(app, "it", words) == status
    assert capsys.readouterr().err == f"{says}\n"


def test_a_value_may_look_like_anything_but_an_option_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(KeyError):  # a bug is no mistake of a person: it keeps its stack
        exit_code(app, "it", ["read", __file__, "--times", "-3", "--loud"])
    assert exit_code(app, "it", ["read", "--", str(tmp_path / "--times")]) == 3
