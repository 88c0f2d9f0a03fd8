"""Reads Arrow and Parquet files, and the folders of data sets made of them, row by row. Knows no fields and no tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgelam_fl.errors import DataError, EnvironmentProblem
from edgelam_fl.names import printable

TABLES = (".parquet", ".arrow")
MAGIC = (b"PAR1", b"ARRO")  # the first bytes of Parquet, and of Arrow's file format
_ROWS = 1024  # read at a time


class Unreadable:
    """A value of a table that Python has no type for, such as a date in the year 20,000. Is refused only if it is used."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"<a value of the type {self._kind}>"


def table_files(folder: Path, formats: str) -> list[Path]:
    """Lists the tables in the folder of one data set. `formats`: what is read instead, for the message.

    Raises DataError if there is none, or if the folder holds several data sets.
    """
    if (folder / "dataset_dict.json").exists():
        raise _several(folder, sorted(file.parent.name for file in folder.glob("*/state.json")))
    # `datasets` writes what it computed from a saved set into the same folder
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in TABLES and not f.name.startswith("cache-")]
    if not files:
        below = sorted({file.parent for end in TABLES for file in folder.glob(f"*/*{end}")})
        hint = f"; {', '.join(map(str, below)):.120} may be meant" if below else ""
        raise DataError(
            f"the folder {folder} holds no {' or '.join(TABLES)} file; --data takes {formats}{hint}", "folder"
        )
    return files


def _several(folder: Path, parts: Sequence[str]) -> DataError:
    one = f"; give one: {folder / parts[0]}" if parts else ", and none of them is complete"
    return DataError(f"{folder} holds several data sets ({', '.join(parts)}){one}", "several-sets")


def table_rows(path: Path, files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of tables with their places, counted over all files. `path`: what the user named.

    A number of a class that the table itself names (ClassLabel of the library `datasets`) becomes that name. Raises
    DataError for a table that is broken, EnvironmentProblem without pyarrow.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path} needs the package pyarrow, which is not installed: pip install 'edgelam-fl[datasets]'",
            "its data need the package pyarrow, which is not installed",
        ) from error
    number = 0
    for file in files:
        for row in _rows(file, number):
            number += 1
            yield f"row {number}", row


def _rows(file: Path, before: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of one file. before: rows of the files before, for places."""
    number = before
    batches = _batches(file)
    while True:
        # A damaged file makes the library raise errors of a dozen classes, MemoryError and KeyError among them.
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
            names, classes = batch.schema.names, _class_names(batch.schema)
            columns = [
                _values(column, classes.get(name, ())) for name, column in zip(names, batch.columns, strict=True)
            ]
        except DataError:
            raise
        except Exception as error:
            words = printable(str(error), 120) or type(error).__name__
            where = f"after row {number}"
            raise DataError(f"{file} cannot be read {where}: {words}", "unreadable", where) from error
        if len(set(names)) < len(names):
            raise DataError(f"{file} must name each column once, got {printable(', '.join(names), 80)}", "header")
        number += batch.num_rows
        for row in zip(*columns, strict=True) if columns else ():
            yield dict(zip(names, row, strict=True))


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import ipc, parquet

    with file.open("rb") as stream:
        magic = stream.read(6)
    if magic.startswith(b"PAR1") or (file.suffix.lower() == ".parquet" and not magic.startswith(b"ARROW1")):
        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=_ROWS)
        return
    with pyarrow.memory_map(str(file)) as source:
        if magic == b"ARROW1":
            table = ipc.open_file(source)
            parts: Iterator[Any] = map(table.get_batch, range(table.num_record_batches))
        else:
            parts = iter(ipc.open_stream(source))
        for part in parts:
            yield from (part.slice(start, _ROWS) for start in range(0, part.num_rows, _ROWS))


def _class_names(schema: Any) -> dict[str, Sequence[str]]:
    """Returns the names of classes by column, as the library `datasets` keeps them in a table."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list)}


def _values(column: Any, classes: Sequence[str]) -> list[Any]:
    try:
        values = column.to_pylist()
    except Exception:  # noqa: BLE001 - a date beyond Python's raises one of half a dozen errors
        values = [_value(value) for value in column]
    if column.type.num_fields:  # nested: a table has every key in every object, and those that an object lacks are null
        return [_without_nulls(value) for value in values]
    if not classes:
        return values
    return [_class_name(value, classes) if isinstance(value, int) else value for value in values]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _value(value: Any) -> Any:
    try:
        return value.as_py()
    except Exception:  # noqa: BLE001 - as above
        return Unreadable(str(value.type))


def _class_name(number: int, classes: Sequence[str]) -> str | None:
    """Returns a class's name; None for one that has none, as -1 means in test sets."""
    return str(classes[number]) if 0 <= number < len(classes) else None
