"""Reads data files of every format as records: named values with their place in the file. Knows no fields and no tasks."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgelam_fl.errors import DataError, EnvironmentProblem

FORMATS = "a .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file, or the folder of a data set"
PASSAGE = "passage"  # the only value in a record of a plain text
_TABLES = (".parquet", ".arrow")

Record = tuple[str, dict[str, Any]]  # its place, such as "line 3"; named values


def read_records(path: Path) -> list[Record]:
    """Reads every example of a file by its suffix (an unknown one means JSON lines), and checks all that needs no run file.

    Raises DataError with the place and what is wrong there.
    """
    records = list(_records(path))
    if len(records) < 2:
        raise DataError(
            f"{path} holds {len(records)} examples; at least 2 are needed: one to learn, one to measure", "few-examples"
        )
    return records


def _records(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if path.is_dir() or (suffix in _TABLES and path.exists()):
        return _table_rows(path)
    text = _text(path)
    if suffix == ".txt":
        return _passages(text)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, text, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json" and text.lstrip().startswith("["):
        return _json_list(path, text)
    return _json_lines(path, text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}; --data takes {FORMATS}", "missing-file") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); convert it first",
            "utf-8",
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "unreadable") from error


def _passages(text: str) -> Iterator[Record]:
    passages = filter(None, map(str.strip, re.split(r"\n\s*\n", text)))
    return ((f"passage {number}", {PASSAGE: passage}) for number, passage in enumerate(passages, 1))


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error.msg}", "json", f"line {number}") from error
            yield _named(path, f"line {number}", value)


def _json_list(path: Path, text: str) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: line {error.lineno}, {error.msg}", "json", f"line {error.lineno}"
        ) from error
    return (_named(path, f"example {number}", value) for number, value in enumerate(values, 1))


def _named(path: Path, place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, {place} must be an object with named fields, got {json.dumps(value):.60}", "object", place
        )
    return place, value


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1  # at which a row begins; a quoted text may span several lines
    try:
        for row in reader:
            place, line = f"line {line}", reader.line_num + 1
            if not any(row):
                continue
            if not header:
                header = _header(path, row)
            elif len(row) != len(header):
                raise DataError(
                    f"{path}, {place} has {len(row)} columns, the header {len(header)} ({', '.join(header):.60}); "
                    f"a text that holds {'a tab' if delimiter == chr(9) else 'a comma'} must be in quotes",
                    "columns",
                    place,
                )
            else:
                yield place, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {line} is not CSV: {error}", "csv", f"line {line}") from error


def _header(path: Path, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names):
        raise DataError(f"{path}, the header must name each column once, got {', '.join(names):.60}", "header")
    return names


def _table_rows(path: Path) -> Iterator[Record]:
    """Yields the rows of Arrow and Parquet files: a folder of `datasets.save_to_disk`, or single tables."""
    files = [path] if path.is_file() else _table_files(path)
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path} needs the package pyarrow, which is not installed: pip install 'edgelam-fl[datasets]'",
            "its data need the package pyarrow, which is not installed",
        ) from error
    number = 0
    for file in files:
        try:
            if file.suffix.lower() == ".parquet":
                table = parquet.read_table(file)
            else:
                with pyarrow.memory_map(str(file)) as source:
                    is_file = source.read(6) == b"ARROW1"
                    source.seek(0)
                    table = (ipc.open_file if is_file else ipc.open_stream)(source).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} cannot be read: {' '.join(str(error).split()):.120}", "unreadable") from error
        for row in table.to_pylist():
            number += 1
            yield f"row {number}", row


def _table_files(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        parts = sorted(file.parent.name for file in folder.glob("*/state.json"))
        raise DataError(
            f"{folder} holds several data sets ({', '.join(parts)}); give one: {folder / parts[0]}", "several-sets"
        )
    # `datasets` writes what it computed from a saved set into the same folder
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in _TABLES and not f.name.startswith("cache-")]
    if not files:
        raise DataError(f"the folder {folder} holds no {' or '.join(_TABLES)} file; --data takes {FORMATS}", "folder")
    return files
