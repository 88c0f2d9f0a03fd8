"""Data sets by name, and what the library `datasets` saves. No test asks a hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.errors import DataError, EnvironmentProblem
from edgelam_fl.tasks.files import read_records
from edgelam_fl.tasks.named import local_data

ROWS = [{"q": f"question {n}", "a": f"answer {n}"} for n in range(5)]


def expected_rows() -> list:
    return [(f"row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    assert read_records(tmp_path / "one") == expected_rows()
    whole.select([3, 1]).save_to_disk(tmp_path / "chosen")
    assert [row for _, row in read_records(tmp_path / "chosen")] == [ROWS[3], ROWS[1]]
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"holds several data sets \(test, train\); give one: .*/two/test"):
        read_records(tmp_path / "two")
    assert local_data(tmp_path / "two:train") == tmp_path / "two" / "train"
    with pytest.raises(DataError, match=r"two has no part 'validation', but test, train"):
        local_data(tmp_path / "two:validation")


def test_a_folder_as_on_a_hub_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = local_data(Path(f"hf:{folder.parent}"))
    assert read_records(found) == expected_rows()
    assert found.parent == tmp_path / "cache" / "data"
    assert [row for _, row in read_records(local_data(Path(f"hf:{folder.parent}:test")))] == ROWS[:2]
    with pytest.raises(DataError, match=r'cannot be loaded: Unknown split "dev"'):
        local_data(Path(f"hf:{folder.parent}:dev"))


class Library:
    """Stands for the library `datasets`: notes what it is asked for, and fails as told."""

    def __init__(self, error: Exception) -> None:
        self.asked: list[Any] = []
        self._error = error

    def load_dataset(self, *path: Any, **how: Any) -> None:
        self.asked.append((*path, how["split"]))
        assert how.keys() == {"split"}, "no code of a data set is trusted"
        raise self._error


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:squad", ("squad", None, "train")),
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:test", ("owner/name", None, "test")),
        ("hf:owner/name/config:train[:10%]", ("owner/name", "config", "train[:10%]")),
        ("hf://datasets/owner/name:test", ("owner/name", None, "test")),
    ],
)
def test_a_name_says_data_set_config_and_split(monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple) -> None:
    library = Library(ConnectionError("Couldn't reach it on the Hub (OfflineModeIsEnabled)"))
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(EnvironmentProblem, match=r"OfflineModeIsEnabled.*the hub does not answer"):
        local_data(Path(name))
    assert library.asked == [asked]


def test_names_without_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", Library(ValueError("BuilderConfig 'x' not found")))
    with pytest.raises(DataError, match=r"hf:a/b/x cannot be loaded: BuilderConfig 'x' not found"):
        local_data(Path("hf:a/b/x"))
    with pytest.raises(DataError, match=r"must be hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:FOLDER"):
        local_data(Path("hf:a/b/c/d"))
    with pytest.raises(DataError, match=r"there is no folder \./none"):
        local_data(Path("hf:./none"))
    for plain in (tmp_path / "none.jsonl", tmp_path / "no:folder", tmp_path):
        assert local_data(plain) == plain, "what is wrong with it, its reader says"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"needs the library datasets.*pip install 'edgelam-fl\[datasets\]'"):
        local_data(Path("hf:a/b"))
