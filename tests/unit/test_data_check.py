"""What is found in the files of a local run before its nodes start, and how an error comes from another process."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.errors import (
    ConfigError,
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
from edgelam_fl.federation.data_check import check_files, eval_files, look_into, outside_words
from edgelam_fl.federation.dealing import deal_file, read_split
from edgelam_fl.federation.from_data import config_from_data
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.kinds import TASKS, make_task
from edgelam_fl.telemetry.events import DataRead, Event, of_kind
from edgelam_fl.wireless.channels.sectors import Sector
from tests.support import run_config
from tests.toy_values import KIND, SERIES, TOY, write_series
from tests.toy_values import SETTINGS as TOY_SETTINGS

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
    look_into([good], settings, tiny.folder)
    with pytest.raises(DataError, match=r"b\.jsonl: no example for training has an answer within task\.max_tokens = 32") as caught:  # fmt: skip
        look_into([good, long], settings, tiny.folder)
    assert caught.value.fault == "no-answer-fits"


def test_an_evaluation_file_is_checked_before_anything_starts_and_said(tiny: ModelSource, tmp_path: Path) -> None:
    good, measured = write(tmp_path / "a.jsonl", "one", "two", "three"), write(tmp_path / "e.jsonl", "one", "new")
    settings = task_settings(run_config(tiny.name)).SerializeToString()
    (seen,) = look_into([good], settings, tiny.folder, [measured])
    assert (seen.examples, seen.held_out, seen.also_learned) == (3, 2, 1)
    said = f"3 examples to learn, 2 of {measured} to measure. WARNING: 1 of those to measure are learned as well"
    assert seen.in_words()[0].endswith(said)
    measured.write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match=r"e\.jsonl, line 1 lacks the field 'answer'"):
        check_files(run_config(tiny.name), [good], [measured])


def test_an_evaluation_file_is_for_all_devices_or_each_has_its_own() -> None:
    e, f = Path("e"), Path("f")
    assert eval_files(2, []) == [None, None]
    assert eval_files(2, [e]) == [e, e]
    assert eval_files(2, [e, f]) == [e, f]
    assert eval_files(1, [e]) == [e]
    with pytest.raises(ConfigError, match=r"once per device \(3 times\), got it 2 times"):
        eval_files(3, [e, f])


def test_a_chat_that_the_template_refuses_is_named_with_its_line_or_skipped(tiny: ModelSource, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    chats = [[{**asked, "content": f"q{n}"}, said] for n in range(4)]
    chats.insert(2, [asked, {**said, "reasoning_content": "which no template here writes"}])
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    settings = task_settings(run_config(tiny.name))
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 3: the model's chat template leaves out .*data\.bad_lines = 'skip'"
    ) as caught:
        look_into([file], settings.SerializeToString(), tiny.folder)
    assert (caught.value.fault, caught.value.place) == ("template", "line 3")
    settings.bad_lines = "skip"
    look_into([file], settings.SerializeToString(), tiny.folder)
    loaded = DeviceExamples(file).load(make_task(settings, tiny.folder), settings, "m")
    assert (loaded.counts.bad, len(loaded.training) + len(loaded.held_out)) == (1, 4)


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


def test_samples_of_arrays_are_seen_as_examples_of_texts_are(
    tmp_path: Path, tiny: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, KIND, TOY)
    config = run_config(tiny.name, *TOY_SETTINGS, "data.held_out=0.25")
    file = write_series(tmp_path / "cell.npz", 12, seed=1)
    (seen,) = look_into([file], task_settings(config).SerializeToString(), tiny.folder)
    assert seen.in_words() == [
        f"{file} (arrays, samples from 'series'): {seen.examples} examples to learn, {seen.held_out} held out"
    ]
    assert seen.examples + seen.held_out == 12
    assert 12 <= seen.tokens <= SERIES * 12
    assert "".join(seen.first_in_lines()).endswith("⟦2 more⟧")
    assert config_from_data([file]).config.task.kind == KIND
    with pytest.raises(ConfigError, match=r"--task causal-lm learns from texts, and .* holds the arrays series"):
        config_from_data([file], task="causal-lm")
    with pytest.raises(ConfigError, match=r"--split 2:iid deals texts, and .* holds arrays"):
        deal_file(file, config, read_split("2"), tmp_path)


def test_what_is_measured_outside_of_what_is_learned_is_said_with_the_range(tmp_path: Path) -> None:
    settings = task_settings(run_config("beamformer", "task.kind=beamforming", "data.held_out=0.25"))
    files = [tmp_path / f"{users}.npz" for users in (3, 4, 6)]
    for users, file in zip((3, 4, 6), files, strict=True):
        np.savez(file, channels=Sector(8, users).draw(4, seed=users))
    few, more, most = files
    seen = look_into([few, more], settings.SerializeToString(), tmp_path, [None, most])
    assert list(outside_words(seen)) == [
        f"WARNING: {most} has users = 6 to measure, outside of the 3 to 4 that are learned"
    ]
    assert not [*outside_words(look_into([few, more], settings.SerializeToString(), tmp_path, [more, few]))]


def test_singular_channels_are_counted_before_anything_starts(tmp_path: Path) -> None:
    channels = Sector(4, 3).draw(5, seed=1)
    channels[[0, 2], 1] = 2 * channels[[0, 2], 0]
    np.savez(tmp_path / "cell.npz", channels=channels, more=np.ones(5))
    settings = task_settings(run_config("beamformer", "task.kind=beamforming", "data.held_out=0.0"))
    (seen,) = look_into([tmp_path / "cell.npz"], settings.SerializeToString(), tmp_path)
    said, events = "a singular channel matrix in 2 of 5 samples: zero forcing is regularised there", list[Event]()
    assert seen.in_words()[-2:] == ["not learned: the array more", said]
    DeviceExamples(tmp_path / "cell.npz").load(make_task(settings, tmp_path), settings, "", events.append)
    (read,) = of_kind(events, DataRead)
    assert read.words()[-1] == said
