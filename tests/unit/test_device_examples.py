"""A device's examples are tokenized anew whenever the model, the settings or the bytes of its data are others, and only then."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgelam_fl.files import content_of
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.tasks.base import Made
from edgelam_fl.tasks.data import DevicePairs, device_pairs
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.telemetry.events import DataChanged, DataCounts, DataRead, JobEvent, of_kind
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.support import CHAT, byte_tokenizer

SETTINGS = pb.TaskSettings(
    kind="causal-lm", max_tokens=200, template="chat", loss_on="answer", prompt_field="question", answer_field="answer", held_out=0.1
)  # fmt: skip


def rows(answer: str = "a", count: int = 12) -> list[dict[str, str]]:
    return [{"question": f"q{n}", "answer": f"{answer}{n}"} for n in range(count)]


def write(file: Path, answer: str = "a", count: int = 12) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(answer, count)), encoding="utf-8")
    return file


class Texts:
    """A task whose examples are the texts themselves, and which counts how often it was asked for some."""

    units: Any = None
    seen: Any = None
    loss_rows: Any = None
    loss: Any = None

    def __init__(self) -> None:
        self.calls = 0

    def examples(self, pairs: Any) -> Made:
        self.calls += 1
        return Made([prompt + answer for prompt, answer in pairs])


def kept_time(file: Path, change: str) -> None:
    """Rewrites a file with as many bytes, and gives it back its time of modification, as rsync -t, tar and cp -p do."""
    before = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace(': "a', f': "{change}'), encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replaced(file: Path, change: str) -> None:
    """Puts another file of the same size and time in its place."""
    other = write(file.with_suffix(".new"), change)
    shutil.copystat(file, other)
    other.replace(file)


def test_two_models_get_their_own_tokens_from_a_device_that_stays_on(tmp_path: Path) -> None:
    """The case stale-tokens: both runs have the same [task], and the second model gives every byte another number."""
    device = DeviceExamples(write(tmp_path / "data.jsonl"))
    for number in (0, 5):
        folder = tmp_path / f"model-{number}"
        tokenizer = byte_tokenizer(shuffled=number, template=CHAT)
        tokenizer.save_pretrained(folder)
        learned, held_out, _ = device.load(make_task(SETTINGS, folder), SETTINGS, f"identity {number}")
        assert tokenizer.decode(learned[0].ids).startswith("<user>q")
        assert tokenizer.decode(held_out[0].ids).startswith("<user>q")


@pytest.mark.parametrize("change", [kept_time, replaced])
def test_data_that_change_are_read_again_and_the_device_says_so(
    tmp_path: Path, change: Callable[[Path, str], None]
) -> None:
    file, task, said = write(tmp_path / "data.jsonl"), Texts(), list[JobEvent]()
    device = DeviceExamples(file)
    before, *_ = device.load(task, SETTINGS, "m", said.append)
    assert "q1a1" in before
    assert not list(of_kind(said, DataChanged))
    change(file, "b")
    after, held_out, _ = device.load(task, SETTINGS, "m", said.append)
    assert "q1b1" in after + held_out
    assert list(of_kind(said, DataChanged)) == [DataChanged(examples=len(after), held_out=len(held_out))]


def test_unchanged_data_are_tokenized_once_however_often_they_are_touched(tmp_path: Path) -> None:
    file, task = write(tmp_path / "data.jsonl"), Texts()
    device = DeviceExamples(file)
    device.load(task, SETTINGS, "m")
    calls = task.calls
    os.utime(file)
    said = list[JobEvent]()
    device.load(task, SETTINGS, "m", said.append)
    assert (task.calls, said) == (calls, [])


def test_examples_that_are_cut_or_left_out_are_counted_and_said(tmp_path: Path) -> None:
    """The case silent-cut: of 24 examples 12 do not fit into 96 tokens of a byte each."""
    folder, file, said = tmp_path / "model", tmp_path / "data.jsonl", list[JobEvent]()
    byte_tokenizer(template=CHAT).save_pretrained(folder)
    lengths = [10] * 12 + [60] * 4 + [200] * 8
    some = [
        {"question": f"{n:02} " + "q" * length, "answer": f"a {n:02}. " + "b" * 30, "note": "n"}
        for n, length in enumerate(lengths)
    ]
    lines = [json.dumps(row) for row in some] + ['{"question": "half', '{"question": "q", "answer": ""}']
    file.write_text("\n".join(lines), encoding="utf-8")
    settings = pb.TaskSettings()
    settings.CopyFrom(SETTINGS)
    settings.max_tokens, settings.bad_lines = 96, "skip"
    device = DeviceExamples(file)
    learned, held_out, counts = device.load(make_task(settings, folder), settings, "m", said.append)
    assert counts.cut + counts.skipped == 12
    assert len(learned) + len(held_out) + counts.skipped == 24
    assert (counts.bad, counts.unread) == (2, 1)
    (event,) = of_kind(said, DataRead)
    assert (event.examples, event.held_out, event.cut, event.skipped) == (
        len(learned), len(held_out), counts.cut, counts.skipped,
    )  # fmt: skip
    words = "\n".join(event.words())
    assert "WARNING: 2 of 26 examples were left out as they cannot be read" in words
    assert "examples that cannot be read: line 25, line 26" in words
    assert "fields that nothing is learned from: note" in words
    assert "(task.max_tokens = 96); raise task.max_tokens" in words
    assert device.load(make_task(settings, folder), settings, "m", said.append).counts == counts
    assert len(list(of_kind(said, DataRead))) == 1
    assert device.count(settings)[0] + device.count(settings)[1] == 24


def test_data_that_are_used_as_they_are_need_no_words(tmp_path: Path) -> None:
    said = list[JobEvent]()
    DeviceExamples(write(tmp_path / "data.jsonl")).load(Texts(), SETTINGS, "m", said.append)
    (event,) = of_kind(said, DataRead)
    assert not event.words()


def test_a_few_that_are_cut_are_no_warning() -> None:
    counts = DataCounts(cut=5, skipped=6)
    assert counts.in_words(80, 14, 96) == (
        "5 of 100 examples were cut (task.max_tokens = 96)",
        "WARNING: 6 of 100 examples were left out as too long (task.max_tokens = 96); raise task.max_tokens, or shorten them",
    )
    assert DataCounts().in_words(1, 0) == (
        "no example is held out, so nothing is measured there (data.held_out, --eval-data)",
    )


def read_all(*files: Path) -> Any:
    """Returns a reader that gives the pairs of each file as one part."""

    def read(path: Path, settings: pb.TaskSettings) -> DevicePairs:
        sides: Any = [
            [(r["question"], r["answer"]) for r in map(json.loads, f.read_text().splitlines())] for f in files
        ]
        return DevicePairs(*sides)

    return read


def test_one_rewritten_file_of_a_folder_is_noticed(tmp_path: Path) -> None:
    """The folder's own time, of a set of tables say, does not change when a file in it is written."""
    folder, task = tmp_path / "data", Texts()
    folder.mkdir()
    parts = [write(folder / f"part-{answer}.parquet", answer) for answer in "ab"]
    device = DeviceExamples(folder, read_all(*parts))
    device.load(task, SETTINGS, "m")
    at = folder.stat().st_mtime_ns
    write(parts[1], "c")
    assert folder.stat().st_mtime_ns == at
    assert device.load(task, SETTINGS, "m")[1][1] == "q1c1"


def test_as_many_held_out_examples_are_measured_as_the_run_asks_for(tmp_path: Path) -> None:
    settings, said = pb.TaskSettings(), list[JobEvent]()
    settings.CopyFrom(SETTINGS)
    settings.held_out, settings.evaluate_examples = 0.5, 2
    device = DeviceExamples(write(tmp_path / "data.jsonl"))
    learned, held_out, counts = device.load(Texts(), settings, "m", said.append)
    assert (len(learned), len(held_out), counts.unmeasured) == (6, 2, 4)
    (event,) = of_kind(said, DataRead)
    assert "2 of 6 held-out examples are measured (federation.evaluate_examples)" in event.words()


def test_the_file_of_held_out_examples_counts_too(tmp_path: Path) -> None:
    file, beside, task = write(tmp_path / "data.jsonl"), write(tmp_path / "held.jsonl", "h"), Texts()
    device = DeviceExamples(file, read_all(file, beside), beside=[beside])
    device.load(task, SETTINGS, "m")
    write(beside, "i")
    assert device.load(task, SETTINGS, "m")[1][1] == "q1i1"


def test_an_evaluation_file_is_measured_and_all_other_data_are_learned(tmp_path: Path) -> None:
    """Whatever data.held_out says; an example in both files is learned all the same, and said."""
    file, beside, said = write(tmp_path / "data.jsonl"), write(tmp_path / "eval.jsonl", "e"), list[JobEvent]()
    first = file.read_text(encoding="utf-8").splitlines()[0]
    beside.write_text(f"{beside.read_text(encoding='utf-8')}{first}\n", encoding="utf-8")
    device = DeviceExamples(file, partial(device_pairs, eval_file=beside), beside=[beside])
    learned, measured, _ = device.load(Texts(), SETTINGS, "m", said.append)
    assert (len(learned), len(measured)) == (12, 13)
    (event,) = of_kind(said, DataRead)
    assert event.also_learned == 1
    assert any("that are in the data too: 1" in words for words in event.words())
    settings = pb.TaskSettings()
    settings.CopyFrom(SETTINGS)
    settings.evaluate_examples = 5
    assert len(device.load(Texts(), settings, "m").held_out) == 5


def test_a_file_that_was_written_moments_ago_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes within one tick of a file system's clock look alike; an old file is trusted by its state alone."""
    file = write(tmp_path / "data.jsonl")
    fresh = content_of(file)
    assert not fresh.settled
    assert content_of(file, fresh) is not fresh
    stat = file.stat()
    later = SimpleNamespace(time_ns=lambda: max(stat.st_mtime_ns, stat.st_ctime_ns) + 10_000_000_000)
    monkeypatch.setattr("edgelam_fl.files.time", later)
    old = content_of(file)
    assert old.digest == fresh.digest
    assert content_of(file, old) is old


def test_a_file_is_read_once_for_the_counts_of_a_join_and_the_round_after_it(tmp_path: Path) -> None:
    file, task, reads = write(tmp_path / "data.jsonl"), Texts(), 0

    def read(path: Path, settings: pb.TaskSettings) -> DevicePairs:
        nonlocal reads
        reads += 1
        return device_pairs(path, settings)

    device = DeviceExamples(file, read)
    many = device.count_tokenized(task, SETTINGS, "model", most=11)
    assert (many.training + many.held_out, task.calls, reads) == (12, 0, 1), "too many to be tokenized now"
    counted = device.count_tokenized(task, SETTINGS, "model", most=12)
    loaded = device.load(task, SETTINGS, "model")
    assert (counted.training, counted.held_out) == (len(loaded.training), len(loaded.held_out))
    assert (task.calls, reads) == (2, 2)
