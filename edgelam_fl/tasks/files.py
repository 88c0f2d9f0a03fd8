"""Reads data files of every format as records: named values with their place in the file. Knows no fields and no tasks.

Whatever a file holds, only DataError comes out of it. What is wrong with one example does not hide the others: `scan`
yields the error in the example's place, and whoever reads decides.
"""

from __future__ import annotations

import csv
import json
import re
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from edgelam_fl.array_files import holds_arrays
from edgelam_fl.errors import DataError
from edgelam_fl.names import printable
from edgelam_fl.tasks.tables import MAGIC, TABLES, table_files, table_rows

FORMATS = "a .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow file, or the folder of a data set"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", *TABLES)
PASSAGE = "passage"  # the only value in a record of a plain text

Record = tuple[str, dict[str, Any]]  # its place, such as "line 3"; named values
Row = Record | DataError

_LONGEST_CHARACTERS = 1 << 26  # of a line, and of a field in a CSV file
_LARGEST_LIST_BYTES = 1 << 30  # of a JSON list, which is read as a whole
_START_CHARACTERS = 4096  # in which the first mark that is no space must be
_DEEPEST = 100  # levels of lists and objects in one example
_HALVES = re.compile("[\ud800-\udfff]")
_NO_TEXT = re.compile("[\udc80-\udcff\0]")  # a byte that is not UTF-8, as `surrogateescape` spells it, or NUL
_CHATS = {
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "tools",
}  # lists within one example

# The first bytes of files that are no text, and the way out.
_SIGNATURES = (
    (b"\x1f\x8b", "is compressed with gzip: unpack it first (gunzip -k)"),
    (b"BZh", "is compressed with bzip2: unpack it first (bunzip2 -k)"),
    (b"\xfd7zXZ\0", "is compressed with xz: unpack it first (unxz -k)"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first"),
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"\xd0\xcf\x11\xe0", "is a spreadsheet or document of Microsoft Office: save it as CSV"),
    (b"%PDF", "is a PDF: write its text into a .txt or .jsonl file"),
    (b"SQLite format 3\0", "is an SQLite database: write its rows as JSON lines"),
    (b"\xff\xfe\0\0", "is UTF-32: save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\0\0\xfe\xff", "is UTF-32: save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (b"version https://git-lfs.github.com", "is a pointer of Git LFS, not the data: fetch them with `git lfs pull`"),
)


def format_of(path: Path) -> str:
    """Returns the name of the format that a file or folder is read as. Raises nothing: reading says what is wrong."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return "a folder of tables"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except (OSError, ValueError):
        magic = b""
    if holds_arrays(path):
        return "arrays"
    if magic in MAGIC or suffix in TABLES:
        return "Parquet" if magic == MAGIC[0] or (magic != MAGIC[1] and suffix == ".parquet") else "Arrow"
    return {".txt": "plain text", ".csv": "CSV", ".tsv": "TSV", ".json": "JSON"}.get(suffix, "JSON lines")


def read_records(path: Path) -> list[Record]:
    """Reads every example of a file by its suffix (an unknown one means JSON lines), and checks all that needs no run file.

    Raises DataError with the place and what is wrong there.
    """
    records = []
    for row in scan(path):
        if isinstance(row, DataError):
            raise row
        records.append(row)
    check_number(path, len(records))
    return records


def check_readable(path: Path) -> list[str]:
    """Reads every example of a file, as far as that needs no run file. Returns the places of those that cannot be read.

    Raises DataError if none can.
    """
    good, bad = 0, list[DataError]()
    for row in scan(path):
        if isinstance(row, DataError):
            bad.append(row)
        else:
            good += 1
    if bad and not good:
        raise bad[0]
    check_number(path, good)
    return [error.place for error in bad]


def check_number(path: Path, examples: int) -> None:
    """Raises DataError for a file without examples, and for a plain text that nothing parts into passages."""
    if not examples:
        raise DataError(f"{path} holds no examples; at least 1 is needed", "few-examples")
    if examples == 1 and path.suffix.lower() == ".txt":
        raise DataError(f"{path} holds one passage; empty lines part the passages of a plain text", "few-examples")


def scan(path: Path) -> Iterator[Row]:
    """Yields every example of a file, or in its place the DataError that says what is wrong with it.

    Raises DataError for what concerns the whole file: it is missing, unreadable, of another format, or broken beyond one
    example. A text file is read line by line, a table part by part.
    """
    try:
        if path.is_dir():
            yield from table_rows(path, table_files(path, FORMATS))
        elif _signature(path) in MAGIC or path.suffix.lower() in TABLES:
            yield from table_rows(path, [path])
        else:
            with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
                yield from _text_rows(path, file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", "unreadable") from error


def _signature(path: Path) -> bytes:
    """Returns the first bytes of a regular file. Raises DataError for anything else, and for formats that are not read."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"no data file at {path}; --data takes {FORMATS}", "missing-file") from error
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{path} is a pipe or a device, and data are read more than once: write them into a file, and give that",
            "unreadable",
        )
    with path.open("rb") as file:
        start = file.read(64)
    for signature, words in _SIGNATURES:
        if start.startswith(signature):
            if path.suffix.lower() in (".xlsx", ".ods"):
                words = "is a spreadsheet: save it as CSV"
            raise DataError(f"{path} {words}", "format")
    return start[:4]


def _text_rows(path: Path, file: TextIO) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _passages(path, file)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, file, "\t" if suffix == ".tsv" else ",")
    return _json_rows(path, file, whole=suffix == ".json")


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Yields the lines with their numbers. Raises DataError for one that no text has."""
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_CHARACTERS), ""), 1):
        if len(line) == _LONGEST_CHARACTERS:
            raise DataError(
                f"{path}, line {number} has more than {_LONGEST_CHARACTERS:,} characters; is it a text file?",
                "too-long",
                f"line {number}",
            )
        yield number, line


def _no_text(text: str) -> str:
    """Says which byte of a text makes it none, as the end of a sentence; empty if all is well."""
    found = _NO_TEXT.search(text)
    if found is None:
        return ""
    if found[0] == "\0":
        return "holds a NUL byte: the file is damaged, or is UTF-16, which must be saved as UTF-8"
    return f"is not UTF-8 (it holds the byte {ord(found[0]) - 0xDC00:#04x}); convert the file first (of Excel: iconv -f CP1252 -t UTF-8)"


# ---------------------------------------------------------------- plain text


def _passages(path: Path, file: TextIO) -> Iterator[Row]:
    number, lines = 0, []
    for at, line in chain(_lines(path, file), [(0, "")]):
        if line.strip():
            lines.append((at, line))
            continue
        if lines:
            number += 1
            bad = next(((at, words) for at, line in lines if (words := _no_text(line))), None)
            passage = "".join(line for _, line in lines).strip()
            lines = []
            if bad:
                yield DataError(f"{path}, line {bad[0]} {bad[1]}", "utf-8", f"line {bad[0]}")
            else:
                yield f"passage {number}", {PASSAGE: passage}


# ---------------------------------------------------------------- JSON


class _Unfit(ValueError):
    """What is wrong with a JSON text that the parser takes."""


def _json_rows(path: Path, file: TextIO, whole: bool) -> Iterator[Row]:
    """Yields the examples of JSON lines, or of one list. whole: the suffix says that the file may be one JSON value."""
    listed = file.read(_START_CHARACTERS).lstrip().startswith("[")
    file.seek(0)
    one_value = (listed or whole) and not _holds_lines(file)
    file.seek(0)
    return _listed(path, file) if one_value else _json_lines(path, file)


def _holds_lines(file: TextIO) -> bool:
    """Whether the first line is JSON by itself, and others follow."""
    lines = filter(str.strip, iter(lambda: file.readline(_LONGEST_CHARACTERS), ""))
    first = next(lines, "")
    if next(lines, "") == "":
        return False
    try:
        _parsed(first)
    except ValueError:
        return False
    return True


def parse_json(text: str) -> Any:
    """Parses JSON that a text holds. Raises ValueError with what is wrong, also with texts in it."""
    value = _parsed(text)
    if words := _unfit(value):
        raise _Unfit(f"it {words}")
    return value


def _parsed(text: str) -> Any:
    """Parses JSON. Raises ValueError with what is wrong; a JSONDecodeError says where, too."""
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except (json.JSONDecodeError, _Unfit):
        raise
    except RecursionError as error:
        raise _Unfit(f"it is nested deeper than {_DEEPEST} levels") from error
    except ValueError as error:  # Python's limit
        raise _Unfit("a number in it has thousands of digits") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Unfit(f"the field {twice!r:.60} stands in one object twice")
    return found


def _problem(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _way_out(line: str) -> str:
    """Says what to do about a line that is not JSON, as the end of a sentence; empty if it is nothing common."""
    if line.startswith(("//", "#", "/*")):
        return "; JSON has no comments: delete the line"
    if line.startswith("{") and line.endswith("},"):
        return "; in JSON lines no comma follows an example: delete it"
    if line == "{":
        return "; each example must be in one line (jq -c . FILE)"
    if line.startswith("{'"):
        return "; JSON has double quotes: write the line by json.dumps"
    return ""


def _json_lines(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in _lines(path, file):
        place = f"line {number}"
        if not line.strip():
            continue
        if words := _no_text(line):
            yield DataError(f"{path}, {place} {words}", "utf-8", place)
            continue
        try:
            value = _parsed(line)
        except ValueError as error:
            yield DataError(f"{path}, {place} is not JSON: {_problem(error)}{_way_out(line.strip())}", "json", place)
        else:
            yield _named(path, place, value)


def _listed(path: Path, file: TextIO) -> Iterator[Row]:
    """Yields the examples of a file that is one JSON value."""
    if path.stat().st_size > _LARGEST_LIST_BYTES:
        raise DataError(
            f"{path} is one JSON list of more than {_LARGEST_LIST_BYTES / 1e9:.0f} GB; write JSON lines, one object per line, which "
            f"are read one by one",
            "too-long",
        )
    text = file.read()
    if found := _NO_TEXT.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise DataError(f"{path}, line {line} {_no_text(found[0])}", "utf-8", f"line {line}")
    if not text.strip():
        return
    try:
        value = _parsed(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: line {error.lineno}, {error.msg}", "json", f"line {error.lineno}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}", "json") from error
    del text
    for number, example in enumerate(_examples(path, value), 1):
        yield _named(path, f"example {number}", example)


def _examples(path: Path, value: Any) -> list[Any]:
    """Returns the examples of a JSON value: a list, an object with a list of objects inside, or one example alone."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = {name: inner for name, inner in value.items() if isinstance(inner, list) and name not in _CHATS}
    examples = {name: inner for name, inner in lists.items() if inner and all(isinstance(row, dict) for row in inner)}
    if len(examples) > 1:
        raise DataError(
            f"{path} holds several lists of examples ({', '.join(map(_shown, examples)):.80}); write the one for this device into a "
            f"file of its own",
            "several-sets",
        )
    if len(examples) == 1:
        return next(iter(examples.values()))
    if len(lists) == len(value) > 1 or (len(value) > 1 and all(isinstance(inner, dict) for inner in value.values())):
        raise DataError(
            f"{path} holds columns ({', '.join(map(_shown, value)):.80}); write one object per example (pandas: "
            f"to_json(orient='records', lines=True))",
            "object",
        )
    return [value]


def _named(path: Path, place: str, value: Any) -> Row:
    if words := _unfit(value):
        return DataError(f"{path}, {place} {words}", "json", place)
    if not isinstance(value, dict):
        return DataError(
            f"{path}, {place} must be an object with named fields, got {json.dumps(value):.60}", "object", place
        )
    return place, value


def _unfit(value: Any) -> str:
    """Says what in a JSON value no text may hold, or is nested too deeply, as the end of a sentence; empty if nothing is."""
    level = [value]
    for _ in range(_DEEPEST):
        for inner in level:
            if isinstance(inner, str) and (half := _HALVES.search(inner)):
                return f"holds half of a character (\\u{ord(half[0]):04x}): a text was cut inside it, as inside an emoji; mend the text"
        level = [part for inner in level for part in _parts(inner)]
        if not level:
            return ""
    return f"is nested deeper than {_DEEPEST} levels"


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value, value.values())
    return value if isinstance(value, list) else ()


# ---------------------------------------------------------------- CSV


def _csv_rows(path: Path, file: TextIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CHARACTERS))  # Python's own is 131,072 characters
    taken: list[str] = []  # the lines of one row; a quoted text may span several

    def lines() -> Iterator[str]:
        for _, line in _lines(path, file):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        begin = reader.line_num + 1
        taken.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            place = f"line {begin}"
            if str(error).startswith(("unexpected end", "field larger")):
                place = f"line {begin + _opening(taken, delimiter)}"
                raise DataError(f"{path}, {place}: the quote that opens there is never closed", "csv", place) from error
            yield DataError(f"{path}, {place} is not CSV: {error}", "csv", place)
            continue
        if row is None:
            return
        place = f"line {begin}"
        if not any(row):
            continue
        words = _no_text("".join(row))
        if words and header:
            yield DataError(f"{path}, {place} {words}", "utf-8", place)
        elif words:
            raise DataError(f"{path}, {place} {words}", "utf-8", place)
        elif not header:
            header = _header(path, row, delimiter)
        elif len(row) != len(header):
            yield DataError(
                f"{path}, {place} has {len(row)} columns, the header {len(header)} ({_names(header)}); "
                f"a text that holds {'a tab' if delimiter == chr(9) else 'a comma'} must be in quotes",
                "columns",
                place,
            )
        elif delimiter == "\t" and _are_rows(taken, len(header)):
            yield DataError(
                f"{path}, {place}: a quote opens there and swallows {len(taken) - 1} lines that seem to be rows of their own; "
                'a text that begins with a quote of its own must be in quotes, and its own doubled: """Yes"", he said"',
                "csv",
                place,
            )
        else:
            yield place, dict(zip(header, row, strict=True))


def _are_rows(lines: list[str], columns: int) -> bool:
    """Whether several lines that quotes make one row of would each be a row with as many columns without quotes.

    Lines that begin with a tab are none: they are of a program.
    """
    return len(lines) > 1 and all(line.count("\t") == columns - 1 and not line.startswith("\t") for line in lines)


def _opening(lines: list[str], delimiter: str) -> int:
    """Returns which of a row's lines, counted from 0, holds the last quote that opens a text."""
    text, at, opened = "".join(lines), 0, 0
    for quote in re.finditer('"', text):
        begins = quote.start() == 0 or text[quote.start() - 1] in (delimiter, "\n")
        if at % 2 or begins:  # one that is open is closed, or goes on if it is doubled
            at, opened = at + 1, opened if at % 2 else quote.start()
    return text.count("\n", 0, opened)


def _header(path: Path, row: list[str], delimiter: str) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names):
        raise DataError(f"{path}, the header must name each column once, got {_names(names)}", "header")
    other = next((mark for mark in ";\t|," if mark in names[0] and mark != delimiter), "") if len(names) == 1 else ""
    if other:
        raise DataError(
            f"{path}, the header is one column, {_shown(names[0])}: its names seem to be parted by {other!r}, and a .csv file's are by "
            f"commas, a .tsv file's by tabs; save it so",
            "header",
        )
    return names


def _names(names: Iterable[str]) -> str:
    return f"{', '.join(map(_shown, names)):.60}"


def _shown(name: str) -> str:
    return printable(name, 60)
