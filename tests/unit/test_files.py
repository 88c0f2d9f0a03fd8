"""What of each format becomes records, and where a bad one is said to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgelam_fl.errors import DataError, EnvironmentProblem
from edgelam_fl.tasks.files import read_records


def records(tmp_path: Path, name: str, content: str) -> list:
    file = tmp_path / name
    file.write_bytes(content.encode())
    return read_records(file)


def problem(tmp_path: Path, name: str, content: str) -> str:
    with pytest.raises(DataError) as caught:
        records(tmp_path, name, content)
    return str(caught.value).replace(str(tmp_path / name), "FILE")


def test_json_may_be_lines_or_one_list(tmp_path: Path) -> None:
    one, two = {"q": "1", "a": "x\ny"}, {"q": "2", "a": "é"}
    listed = json.dumps([one, two], indent=1, ensure_ascii=False)
    assert records(tmp_path, "list.json", f"\n{listed}\n") == [("example 1", one), ("example 2", two)]
    lines = f"{json.dumps(one)}\n\n{json.dumps(two)}"
    assert records(tmp_path, "lines.json", lines) == [("line 1", one), ("line 3", two)]
    assert records(tmp_path, "data.unheard-of", lines) == [("line 1", one), ("line 3", two)]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_has_quotes_commas_and_lines_within(tmp_path: Path, start: str, end: str) -> None:
    content = start + end.join(["q, a", 'What?,"so, ""so"""', '"two', 'lines",x', "", "last,y"])
    assert records(tmp_path, "data.csv", content) == [
        ("line 2", {"q": "What?", "a": 'so, "so"'}),
        ("line 3", {"q": "two\nlines", "a": "x"}),
        ("line 6", {"q": "last", "a": "y"}),
    ]


def test_tsv_is_parted_by_tabs(tmp_path: Path) -> None:
    assert records(tmp_path, "data.TSV", "q\ta\n1, 2\tx\n3\ty\n")[0] == ("line 2", {"q": "1, 2", "a": "x"})


def test_passages_are_parted_by_empty_lines(tmp_path: Path) -> None:
    content = "\n\nFirst\npassage.\r\n \t\r\n\r\nSecond.\n\n\n"
    assert [(place, record["passage"]) for place, record in records(tmp_path, "data.txt", content)] == [
        ("passage 1", "First\npassage."),
        ("passage 2", "Second."),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"q": 1},\n {"q": 2]', "FILE is not JSON: line 2, Expecting ',' delimiter"),
        ("a.json", '[{"q": 1}, "x"]', 'FILE, example 2 must be an object with named fields, got "x"'),
        ("a.json", "[]", "FILE holds 0 examples; at least 2 are needed: one to learn, one to measure"),
        ("a.txt", "One passage.\nNo other.", "FILE holds 1 examples; at least 2 are needed: one to learn, one to measure"),
        ("a.csv", "q,a\n1,2\n", "FILE holds 1 examples; at least 2 are needed: one to learn, one to measure"),
        (
            "a.csv",
            "q,a\n1,2\nyes, we can,3\n",
            "FILE, line 3 has 3 columns, the header 2 (q, a); a text that holds a comma must be in quotes",
        ),
        ("a.tsv", "q\ta\n1\n", "FILE, line 2 has 1 columns, the header 2 (q, a); a text that holds a tab must be in quotes"),
        ("a.csv", 'q,a\n1,2\n"x,3\n4,5\n', "FILE, line 3 is not CSV: unexpected end of data"),
        ("a.csv", "q,a,q\n1,2,3\n", "FILE, the header must name each column once, got q, a, q"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_place_and_reason(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert problem(tmp_path, name, content) == expected


ROWS = [{"q": f"question {n}", "a": f"answer {n}"} for n in range(5)]


def expected_rows() -> list:
    return [(f"row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_tables_are_read_from_every_file_of_a_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table.slice(0, 2), tmp_path / "data-0.parquet")
    for number, new, part in [(1, ipc.new_stream, table.slice(2, 2)), (2, ipc.new_file, table.slice(4))]:
        with new(str(tmp_path / f"data-{number}.arrow"), table.schema) as writer:
            writer.write_table(part)
    (tmp_path / "cache-1.arrow").write_bytes(b"computed by datasets")
    assert read_records(tmp_path) == expected_rows()
    assert read_records(tmp_path / "data-0.parquet") == expected_rows()[:2]
    for name in ("broken.arrow", "broken.parquet"):
        (tmp_path / name).write_bytes(b"ARROW1, but no more")
        with pytest.raises(DataError, match=rf"{name} cannot be read: "):
            read_records(tmp_path / name)


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


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(EnvironmentProblem, match=r"needs the package pyarrow.*pip install 'edgelam-fl\[datasets\]'"):
        read_records(tmp_path)
