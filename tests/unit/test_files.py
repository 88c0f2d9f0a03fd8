"""What of each format becomes records, and where a bad one is said to be."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from pathlib import Path

import pytest

from edgelam_fl.errors import DataError, EnvironmentProblem
from edgelam_fl.tasks.files import read_records, scan


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


def test_a_quoted_program_with_tabs_is_one_text(tmp_path: Path) -> None:
    content = 'q\ta\nWrite it.\t"def f():\n\treturn 1"\n'
    assert records(tmp_path, "data.tsv", content) == [("line 2", {"q": "Write it.", "a": "def f():\n\treturn 1"})]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"q": 1},\n {"q": 2]', "FILE is not JSON: line 2, Expecting ',' delimiter"),
        ("a.json", '[{"q": 1}, "x"]', 'FILE, example 2 must be an object with named fields, got "x"'),
        ("a.jsonl", '// mine\n{"q": 1}\n', "FILE, line 1 is not JSON: Expecting value; JSON has no comments: delete the line"),
        ("a.jsonl", '{"q": 1},\n{"q": 2}\n', "FILE, line 1 is not JSON: Extra data; in JSON lines no comma follows an example: delete it"),
        ("a.jsonl", '{\n"q": 1\n}\n', "FILE, line 1 is not JSON: Expecting property name enclosed in double quotes; each example must be in one line (jq -c . FILE)"),
        ("a.jsonl", "{'q': 1}\n{'q': 2}\n", "FILE, line 1 is not JSON: Expecting property name enclosed in double quotes; JSON has double quotes: write the line by json.dumps"),
        ("a.json", "[]", "FILE holds no examples; at least 1 is needed"),
        ("a.txt", "\n \n", "FILE holds no examples; at least 1 is needed"),
        ("a.txt", "One passage.\nNo other.", "FILE holds one passage; empty lines part the passages of a plain text"),
        ("a.csv", "q,a\n", "FILE holds no examples; at least 1 is needed"),
        (
            "a.csv",
            "q,a\n1,2\nyes, we can,3\n",
            "FILE, line 3 has 3 columns, the header 2 (q, a); a text that holds a comma must be in quotes",
        ),
        ("a.tsv", "q\ta\n1\n", "FILE, line 2 has 1 columns, the header 2 (q, a); a text that holds a tab must be in quotes"),
        ("a.csv", 'q,a\n1,2\n"x,3\n4,5\n', "FILE, line 3: the quote that opens there is never closed"),
        ("a.csv", 'q,a\n"two\nlines",2\n"x\ny","never\n4,5\n', "FILE, line 5: the quote that opens there is never closed"),
        ("a.csv", 'q,a\n"1"x,2\n3,4\n', "FILE, line 2 is not CSV: ',' expected after '\"'"),
        ("a.tsv", 'q\ta\n"Yes, he said\t1\nx\t2\nno"\t3\n', "FILE, line 2: a quote opens there and swallows 2 lines that seem to be rows of their own; a text that begins with a quote of its own must be in quotes, and its own doubled: \"\"\"Yes\"\", he said\""),
        ("a.csv", "q;a\n1;2\n", "FILE, the header is one column, q;a: its names seem to be parted by ';', and a .csv file's are by commas, a .tsv file's by tabs; save it so"),
        ("a.jsonl", '{"q": 1}\n{"q": "\\ud83d"}', "FILE, line 2 holds half of a character (\\ud83d): a text was cut inside it, as inside an emoji; mend the text"),
        ("a.jsonl", '{"q": 1}\n{"\\udc00": 2}', "FILE, line 2 holds half of a character (\\udc00): a text was cut inside it, as inside an emoji; mend the text"),
        ("a.json", '[{"q": 1}, {"q": ["\\ud83d"]}]', "FILE, example 2 holds half of a character (\\ud83d): a text was cut inside it, as inside an emoji; mend the text"),
        ("a.jsonl", '{"q": 1}\n{"q": ' + "9" * 5000 + "}", "FILE, line 2 is not JSON: a number in it has thousands of digits"),
        ("a.json", "[" + "9" * 5000 + "]", "FILE cannot be read as JSON: a number in it has thousands of digits"),
        ("a.jsonl", '{"q": 1}\n' + "[" * 100_000, "FILE, line 2 is not JSON: it is nested deeper than 100 levels"),
        ("a.jsonl", '{"q": 1}\n{"q": ' + "[" * 200 + "]" * 200 + "}", "FILE, line 2 is nested deeper than 100 levels"),
        ("a.json", "[" * 100_000, "FILE cannot be read as JSON: it is nested deeper than 100 levels"),
        ("a.jsonl", '{"q": 1}\n{"q": 1, "a": 2, "q": 3}', "FILE, line 2 is not JSON: the field 'q' stands in one object twice"),
        ("a.jsonl", '{"q": 1}\n{"q": "a\0"}', "FILE, line 2 holds a NUL byte: the file is damaged, or is UTF-16, which must be saved as UTF-8"),
        ("a.csv", "q,a\n1,2\n\0,3\n", "FILE, line 3 holds a NUL byte: the file is damaged, or is UTF-16, which must be saved as UTF-8"),
        ("a.txt", "One.\n\nTwo\nand\0.\n", "FILE, line 4 holds a NUL byte: the file is damaged, or is UTF-16, which must be saved as UTF-8"),
        ("a.json", '{"train": [{"q": 1}, {"q": 2}], "test": [{"q": 3}]}', "FILE holds several lists of examples (train, test); write the one for this device into a file of its own"),
        ("a.json", '{"q": ["1", "2"], "a": ["3", "4"]}', "FILE holds columns (q, a); write one object per example (pandas: to_json(orient='records', lines=True))"),
        ("a.json", '{"q": {"0": "1"}, "a": {"0": "3"}}', "FILE holds columns (q, a); write one object per example (pandas: to_json(orient='records', lines=True))"),
        ("a.json", "7", "FILE, example 1 must be an object with named fields, got 7"),
        ("a.csv", "q,a,q\n1,2,3\n", "FILE, the header must name each column once, got q, a, q"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_place_and_reason(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert problem(tmp_path, name, content) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x1f\x8b\x08\x00", "is compressed with gzip: unpack it first (gunzip -k)"),
        (b"PK\x03\x04\x14", "is a zip archive: unpack it first"),
        ("q,a".encode("utf-16"), "is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
        ("q,a".encode("utf-32"), "is UTF-32: save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
        (b"%PDF-1.7", "is a PDF: write its text into a .txt or .jsonl file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet"])
def test_a_format_that_is_not_read_is_named_by_its_first_bytes(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert str(caught.value) == f"{file} {words}"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe, loop = tmp_path / "pipe.jsonl", tmp_path / "loop.jsonl"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for file, words in [
        (pipe, "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (loop, "cannot be read"),
        (tmp_path / "a\0b", "no data file at"),
        (tmp_path / ("a" * 300), "cannot be read"),
        (tmp_path / "pipe.jsonl" / "inside", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=words):
            read_records(file)


def test_one_bad_example_does_not_hide_the_others(tmp_path: Path) -> None:
    for name, content, places in [
        ("a.jsonl", b'{"q": 1}\nno\n{"q": "\xe9"}\n[]\n{"q": 2}\n', ["line 1", "line 2", "line 3", "line 4", "line 5"]),
        ("a.csv", b'q,a\n1,2\n"3"x,4\n5\n\xe9,6\n7,8\n', ["line 2", "line 3", "line 4", "line 5", "line 6"]),
        ("a.txt", b"One.\n\nTw\xe9.\n\nThree.", ["passage 1", "line 3", "passage 3"]),
        ("a.json", b'[{"q": 1}, 2, {"q": 3}]', ["example 1", "example 2", "example 3"]),
    ]:
        file = tmp_path / name
        file.write_bytes(content)
        rows = list(scan(file))
        assert [row.place if isinstance(row, DataError) else row[0] for row in rows] == places
        assert [isinstance(row, DataError) for row in rows] == [False, *[True] * (len(rows) - 2), False]


def test_a_list_is_found_inside_an_object_and_whatever_the_suffix(tmp_path: Path) -> None:
    inside = json.dumps({"version": 1, "data": [{"q": "1"}, {"q": "2"}]}, indent=1)
    assert records(tmp_path, "a.json", inside) == [("example 1", {"q": "1"}), ("example 2", {"q": "2"})]
    assert records(tmp_path, "a.jsonl", '[{"q": "1"},\n{"q": "2"}]')[1] == ("example 2", {"q": "2"})
    one_line = '{"data": [{"q": "1"}]}\n{"data": [{"q": "2"}]}\n'
    assert records(tmp_path, "b.json", one_line)[1] == ("line 2", {"data": [{"q": "2"}]})


def test_long_fields_and_old_line_ends_are_read(tmp_path: Path) -> None:
    long = "word " * 30_000
    assert records(tmp_path, "a.csv", f"q,a\n1,{long}\n2,x\n")[0][1] == {"q": "1", "a": long}
    assert records(tmp_path, "b.csv", "q,a\r1,2\r3,4\r")[1] == ("line 3", {"q": "3", "a": "4"})
    assert records(tmp_path, "b.jsonl", '{"q": 1}\r{"q": 2}\r')[1] == ("line 2", {"q": 2})
    assert records(tmp_path, "c.jsonl", '\ufeff{"q": NaN}\n{"q": -Infinity}')[1][1] == {"q": -math.inf}


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
        with pytest.raises(DataError, match=rf"{name} cannot be read after row 0: "):
            read_records(tmp_path / name)
    table = tmp_path / "whatever.its-name"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    assert read_records(table) == expected_rows()


def test_columns_of_every_kind_are_read_and_classes_get_their_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    table = pyarrow.table(
        {
            "label": [0, 1, -1],
            "kind": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
            "day": pyarrow.array([0, 10**7, None], pyarrow.int32()).cast(pyarrow.date32()),  # one is in the year 29349
            "turns": [[{"role": "user"}], [], None],
            "raw": [b"x", b"\xff", None],
        }
    ).replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second, third = (row for _, row in read_records(tmp_path / "a.parquet"))
    assert first == {
        "label": "neg",
        "kind": "a",
        "day": datetime.date(1970, 1, 1),
        "turns": [{"role": "user"}],
        "raw": b"x",
    }
    assert (second["label"], third["label"]) == ("pos", None)
    assert repr(second["day"]) == "<a value of the type date32[day]>"
    parquet.write_table(pyarrow.table([["x"], ["y"]], names=["q", "q"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet must name each column once, got q, q"):
        read_records(tmp_path / "b.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(EnvironmentProblem, match=r"needs the package pyarrow.*pip install 'edgelam-fl\[datasets\]'"):
        read_records(tmp_path)
