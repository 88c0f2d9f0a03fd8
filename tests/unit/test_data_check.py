"""What is found in the files of a local run before its nodes start, and how an error comes from another process."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from edgelam_fl.errors import (
    DataError,
    DoesNotFit,
    EdgelamError,
    EnvironmentProblem,
    Mismatch,
    ModelError,
    RunFailed,
    code_of,
    exit_code_of,
    is_final,
    known_code,
)
from edgelam_fl.federation.data_check import check_files, check_tokenized
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.making import task_settings
from tests.support import run_config

ERRORS = [
    DataError("file, line 3", "json", "line 3"), EnvironmentProblem("a disk", "its disk"), DoesNotFit("too large", 12.0),
    RunFailed("over", 2), Mismatch("another model"), ModelError("none"),
]  # fmt: skip


def write(file: Path, *answers: str) -> Path:
    rows = [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_files_are_read_before_anything_starts_and_the_bad_one_is_named(tiny: ModelSource, tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", "one", "two", "three")
    bad = write(tmp_path / "b.jsonl", "one", "\ud83d", "three")
    with pytest.raises(DataError, match=r"b\.jsonl, line 2 holds half of a character"):
        check_files(run_config(tiny.name), [good, bad])


def test_a_file_of_which_no_answer_fits_is_named_before_a_node_starts(tiny: ModelSource, tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", "one", "two", "three")
    long = write(tmp_path / "b.jsonl", *["word " * 40 + str(n) for n in range(3)])
    settings = task_settings(run_config(tiny.name, "task.max_tokens=32", "task.too_long=skip")).SerializeToString()
    check_tokenized([good], settings, tiny.folder)
    with pytest.raises(DataError, match=r"b\.jsonl: no example for training has an answer within task\.max_tokens = 32") as caught:  # fmt: skip
        check_tokenized([good, long], settings, tiny.folder)
    assert caught.value.fault == "no-answer-fits"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_another_process_is_the_same_here(error: EdgelamError) -> None:
    back = copy.copy(error)  # by the same way as pickle takes
    assert type(back) is type(error)
    assert (str(back), vars(back), back.exit_code, back.for_others()) == (
        str(error), vars(error), error.exit_code, error.for_others()
    )  # fmt: skip


def test_the_codes_of_errors() -> None:
    assert [code_of(error) for error in ERRORS] == ["data", "environment", "no-fit", "run", "mismatch", "model"]
    assert [is_final(code_of(error)) for error in ERRORS] == [True, False, False, False, True, True]
    assert (code_of(IndexError()), is_final("bug"), is_final("")) == ("bug", False, False)
    assert (known_code("bug"), known_code("mismatch"), known_code("<b>")) == ("bug", "mismatch", "")
    assert [exit_code_of(codes) for codes in (["data"], ["data", "model"], ["data", "bug"], [])] == [2, 2, 4, 4]
