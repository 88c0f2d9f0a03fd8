"""Makes data files of every format that no sane program writes, and checks that readers answer with a DataError at worst."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from edgelam_fl.errors import DataError, DataFault, EdgelamError
from edgelam_fl.tasks.base import Task
from edgelam_fl.tasks.data import DevicePairs, device_pairs
from edgelam_fl.tasks.files import read_records
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.tasks.suggest import suggest
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.support import byte_tokenizer

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".JSONL", ".data", "")
# Faults of one example: they always come with its place.
PLACED = frozenset({"csv", "utf-8", "empty-field", "turn", "tools", "unknown-class", "preference"})
_NAMES = (
    "question", "answer", "prompt", "completion", "messages", "conversations", "tools", "functions", "system", "text", "label",
    "instruction", "input", "output", "chosen", "rejected", "role", "content", "from", "value", "passage",
)  # fmt: skip
_RAW = (
    "[" * 3000,
    "9" * 5000,
    "1e999",
    '"\\ud83d"',
    '"\\ud83d\\ude00"',
    "NaN",
    "-Infinity",
    "{",
    '{"a": 1, "a": 2}',
    "\0",
)

any_text = st.text(st.characters(exclude_categories=()), max_size=12)  # half characters too
plain_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
names = st.sampled_from(_NAMES) | any_text
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | st.sampled_from([f"RAW{n}" for n in range(len(_RAW))])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
roles = st.sampled_from(
    ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "developer", "bot", 1]
)
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": values, "arguments": values | st.just('{"a": "\\ud83d"}')})}
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": roles, "from": roles, "content": values | plain_text, "value": values | plain_text, "weight": values,
        "tool_calls": st.lists(calls | values, max_size=2) | values, "function_call": calls | values, "name": values,
    },
)  # fmt: skip
chats = st.lists(messages | values, max_size=4) | st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, roles, plain_text), max_size=4
)
chat_records = st.fixed_dictionaries(
    {"messages": chats}, optional={"tools": values, "system": values}
) | st.fixed_dictionaries({"conversations": chats})
records = (
    chat_records
    | st.dictionaries(names, values | plain_text | chats, max_size=5)
    | st.fixed_dictionaries({"question": plain_text | values, "answer": plain_text | values})
)
ends = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028", " "])


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _json(value: Any, is_ascii: bool) -> str:
    text = json.dumps(value, ensure_ascii=is_ascii)
    for number, raw in enumerate(_RAW):
        text = text.replace(f'"RAW{number}"', raw)
    return text


@st.composite
def json_files(draw: st.DrawFn) -> bytes:
    is_ascii = draw(st.booleans())
    rows = [_json(row, is_ascii) for row in draw(st.lists(records | values, max_size=5))]
    whole = draw(st.sampled_from(["lines", "list", "object"]))
    if whole == "lines":
        return _encoded(draw(ends).join(rows))
    listed = f"[{', '.join(rows)}]"
    return _encoded(
        listed
        if whole == "list"
        else f'{{{_json(draw(names), is_ascii)}: {listed}, "more": {_json(draw(values), is_ascii)}}}'
    )


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    mark = draw(st.sampled_from([",", "\t", ";"]))
    cells = any_text | st.sampled_from(["question", "answer", '"', '""', '"open', 'clo"sed"', '"a\nb"', "x" * 300])
    rows = [mark.join(row) for row in draw(st.lists(st.lists(cells, min_size=1, max_size=3), max_size=5))]
    head = draw(st.sampled_from(["", f"question{mark}answer\n", "\ufeffquestion,answer\n"]))
    return _encoded(head + draw(ends).join(rows))


@st.composite
def byte_files(draw: st.DrawFn) -> bytes:
    start = draw(
        st.sampled_from([b"", b"PAR1", b"ARROW1\0\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PK\3\4", b"{", b"["])
    )
    return start + draw(st.binary(max_size=200))


@st.composite
def table_files(draw: st.DrawFn) -> bytes:
    import pyarrow
    from pyarrow import parquet

    rows = draw(st.integers(0, 4))

    def column(values: st.SearchStrategy[Any], kind: Any) -> Any:
        return st.lists(st.none() | values, min_size=rows, max_size=rows).map(lambda found: pyarrow.array(found, kind))

    struct = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    said = st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.none() | plain_text}),
        max_size=3,
    )
    columns = st.one_of(
        column(plain_text, pyarrow.string()),
        column(plain_text, pyarrow.large_string()),
        column(plain_text, pyarrow.string()).map(lambda array: array.dictionary_encode()),
        column(st.binary(max_size=8), pyarrow.binary()),
        column(st.integers(-(2**31), 2**31 - 1), pyarrow.int32()),
        column(st.integers(-(2**31), 2**31 - 1), pyarrow.int32()).map(lambda array: array.cast(pyarrow.date32())),
        column(st.integers(-(2**63), 2**63 - 1), pyarrow.int64()).map(
            lambda array: array.cast(pyarrow.timestamp("us"))
        ),
        column(st.integers(-(2**50), 2**50), pyarrow.int64()).map(
            lambda array: array.cast(pyarrow.timestamp("s", "Mars/Base"))
        ),
        column(st.integers(-(2**62), 2**62), pyarrow.int64()).map(lambda array: array.cast(pyarrow.duration("ns"))),
        column(st.booleans(), pyarrow.bool_()),
        column(st.floats(), pyarrow.float64()),
        column(said, struct),
    )
    fields = draw(st.lists(st.tuples(st.sampled_from(_NAMES), columns), min_size=1, max_size=4))
    table = pyarrow.table([array for _, array in fields], names=[name for name, _ in fields])
    features = {"info": {"features": {"label": {"names": draw(values), "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    sink = pyarrow.BufferOutputStream()
    if draw(st.booleans()):
        parquet.write_table(table, sink)
    else:
        new = draw(st.sampled_from([pyarrow.ipc.new_file, pyarrow.ipc.new_stream]))
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


@st.composite
def damaged(draw: st.DrawFn, files: st.SearchStrategy[bytes]) -> bytes:
    """Draws a file, and often overwrites, cuts or doubles a part of it."""
    content = draw(files)
    if content and draw(st.booleans()):
        at = draw(st.integers(0, len(content) - 1))
        to = draw(st.integers(at, min(len(content), at + 16)))
        content = content[:at] + draw(st.binary(max_size=4) | st.just(content[at:to] * 2)) + content[to:]
    return content


# kind -> how its files are made, and the suffixes that most of them have
KINDS: dict[str, tuple[Callable[[], st.SearchStrategy[bytes]], tuple[str, ...]]] = {
    "bytes": (byte_files, SUFFIXES),
    "JSON": (json_files, (".jsonl", ".jsonl", ".json")),
    "CSV": (csv_files, (".csv", ".tsv")),
    "tables": (table_files, (".parquet", ".arrow")),
}


@dataclass
class Tally:
    """What became of files."""

    files: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """Faults of the DataErrors, and "read"."""
    problems: list[str] = field(default_factory=list)
    """Whatever else came out, with the file."""


def _settings(**more: Any) -> pb.TaskSettings:
    usual: dict[str, Any] = {
        "kind": "causal-lm", "template": "chat", "loss_on": "answer", "held_out": 0.3, "prompt_field": "question", "answer_field": "answer"
    }  # fmt: skip
    return pb.TaskSettings(**{**usual, **more})


READERS: dict[str, Callable[[Path], object]] = {
    "records": read_records,
    "a run": lambda path: device_pairs(path, _settings()),
    "bad lines skipped": lambda path: device_pairs(path, _settings(bad_lines="skip")),
    "completions": lambda path: device_pairs(path, _settings(prompt_field="prompt", answer_field="completion", more_prompt_fields=["input"])),
    "classes": lambda path: device_pairs(path, _settings(kind="classification", classes=["0", "True", "a"], prompt_field="text", answer_field="label")),
    "init": lambda path: suggest([path], None),
}  # fmt: skip


def check(path: Path, tally: Tally, task: Task) -> None:
    """Reads a file by every reader, makes examples of what was read, and notes what came out."""
    for name, read in READERS.items():
        try:
            found = read(path)
        except DataError as error:
            tally.outcomes[error.fault] += 1
            _check_error(path, name, error, tally)
            continue
        except BaseException as error:  # noqa: BLE001 - it is what is looked for
            tally.problems.append(f"{name}: {_told(error, path)}")
            continue
        tally.outcomes["read"] += 1
        if isinstance(found, DevicePairs):
            try:
                task.examples([*found.training, *found.held_out])
            except EdgelamError:
                tally.outcomes["refused by the task"] += 1
            except BaseException as error:  # noqa: BLE001 - as above
                tally.problems.append(f"examples of {name}: {_told(error, path)}")


def _told(error: BaseException, path: Path) -> str:
    return f"{type(error).__name__}: {error!s:.200} of {path.suffix} {path.read_bytes()!r:.600}"


def _check_error(path: Path, name: str, error: DataError, tally: Tally) -> None:
    text = str(error)
    wrong = ""
    if str(path) not in text:
        wrong = "names no file"
    elif error.fault not in get_args(DataFault):
        wrong = "unknown fault"
    elif error.fault in PLACED and not error.place:
        wrong = "names no place"
    elif error.place and (error.place not in text or not error.place.replace(" ", "").isalnum()):
        wrong = "names its place otherwise"
    else:
        try:
            text.encode()
        except UnicodeEncodeError:
            wrong = "cannot be printed"
    if wrong:
        tally.problems.append(f"{name}: {wrong}: {text!r:.300} of {path.suffix} {path.read_bytes()!r:.600}")


def fuzz(kind: str, times: int, from_seed: int) -> Tally:
    """Reads so many files of a kind, each by every reader."""
    tally = Tally()
    files, usual = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save_pretrained(folder)
        task = make_task(_settings(max_tokens=64), Path(folder))

        @seed(from_seed)
        @settings(
            max_examples=times,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(content=damaged(files()), suffix=st.sampled_from(usual) | st.sampled_from(SUFFIXES))
        def one(content: bytes, suffix: str) -> None:
            with _file(content, suffix) as path:
                check(path, tally, task)
                tally.files += 1

        one()
    return tally


@contextmanager
def _file(content: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)
