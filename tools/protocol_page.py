"""Writes the tables of docs/protocol.md from edgelam.proto and its comments: `python -m tools.protocol_page`.

`declaration` reads the .proto; `page` writes the tables between the page's markers and leaves all other text unchanged.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "edgelam_fl" / "wire" / "edgelam.proto"
PAGE = ROOT / "docs" / "protocol.md"
FRAME_MESSAGES = (
    "Header", "Tensor", "Hello", "Ready", "NotReady", "Refuse", "Table", "StepRow", "TableAll", "StepTotal", "StepClose",
    "LeftOut", "StepReady", "StepApply", "Done", "Cancel", "Error", "Progress", "KvStep", "KvDrop",
)  # fmt: skip
_TYPES = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)

Comments = dict[tuple[int, ...], str]  # comment by a declaration's path in the file, as protobuf numbers it


def declaration() -> tuple[FileDescriptorProto, Comments]:
    """Reads the .proto; returns its declarations and their comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        arguments = ["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={out}", "--include_source_info", str(PROTO)]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"{PROTO} cannot be read; see protoc's message above")
        (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    comments = {
        tuple(place.path): " ".join((place.trailing_comments or place.leading_comments).split())
        for place in file.source_code_info.location
    }
    return file, comments


def declared() -> Iterator[tuple[str, str]]:
    """Yields the name of every field, kind and method, and its comment."""
    file, comments = declaration()
    for number, message in enumerate(file.message_type):
        for index, field in enumerate(message.field):
            yield f"{message.name}.{field.name}", comments.get((4, number, 2, index), "")
    for number, enum in enumerate(file.enum_type):
        for index, value in enumerate(enum.value):
            yield f"{enum.name}.{value.name}", comments.get((5, number, 2, index), "")
    for number, service in enumerate(file.service):
        for index, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", comments.get((6, number, 2, index), "")


def page(text: str) -> str:
    """Returns the page with the tables as the .proto has them now."""
    tables = dict(_tables(*declaration()))
    return _MARKED.sub(lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}", text)


def _tables(file: FileDescriptorProto, comments: Comments) -> Iterator[tuple[str, str]]:
    messages = {message.name: (number, message) for number, message in enumerate(file.message_type)}
    kinds = next((number, enum) for number, enum in enumerate(file.enum_type) if enum.name == "Kind")
    yield "kinds", _kinds(*kinds, comments)
    yield "frames", "\n\n".join(_fields(*messages[name], comments) for name in FRAME_MESSAGES)
    yield "services", "\n\n".join(_methods(number, service, comments) for number, service in enumerate(file.service))


def _kinds(number: int, enum: EnumDescriptorProto, comments: Comments) -> str:
    rows = ["| number | kind | direction and meaning |", "| --- | --- | --- |"]
    for index, value in enumerate(enum.value):
        if value.number:
            rows.append(f"| {value.number} | `{value.name}` | {_cell(comments, 5, number, 2, index)} |")
    reserved = sorted(n for span in enum.reserved_range for n in range(span.start, span.end + 1))
    return "\n".join([*rows, "", f"Reserved numbers: {', '.join(map(str, reserved))}."])


def _fields(number: int, message: DescriptorProto, comments: Comments) -> str:
    rows = [f"**{message.name}**", "", "| number | field | type | meaning |", "| --- | --- | --- | --- |"]
    for index, field in enumerate(message.field):
        meaning = _cell(comments, 4, number, 2, index)
        rows.append(f"| {field.number} | `{field.name}` | {_type(message, field)} | {meaning} |")
    return "\n".join(rows)


def _type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    name = field.type_name.rpartition(".")[2] or _TYPES[field.type]
    for entry in message.nested_type:
        if entry.name == name and entry.options.map_entry:
            key, value = entry.field
            return f"map<{_type(entry, key)}, {_type(entry, value)}>"
    return f"repeated {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def _methods(number: int, service: ServiceDescriptorProto, comments: Comments) -> str:
    rows = [f"**{service.name}**: {comments.get((6, number), '')}", "", "| method | request | answer | what it does |", "| --- | --- | --- | --- |"]  # fmt: skip
    for index, method in enumerate(service.method):
        request = _message(method.input_type, method.client_streaming)
        answer = _message(method.output_type, method.server_streaming)
        rows.append(f"| `{method.name}` | {request} | {answer} | {_cell(comments, 6, number, 2, index)} |")
    return "\n".join(rows)


def _message(name: str, streams: bool) -> str:
    name = name.rpartition(".")[2].replace("RawBytes", "bytes")
    return f"stream of {name}" if streams else name


def _cell(comments: Comments, *place: int) -> str:
    return comments.get(place, "").replace("|", "or").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
