"""The wire's declaration: what is generated from it is not stale, and everything in it has a comment."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc_tools import protoc

from edgelam_fl.hub.echo import LIMITS
from edgelam_fl.wire.grpc.options import DEFAULT_TIMING, MESSAGE_BYTES
from edgelam_fl.wire.link import CHUNK_BYTES, MAX_CHUNK_BYTES, MAX_HEADER_BYTES, MIN_CHUNK_BYTES
from tools.protocol_page import PAGE, declared, page

WIRE = Path(__file__).parents[2] / "edgelam_fl" / "wire"


@pytest.mark.parametrize("name", ["edgelam_pb2.py", "edgelam_pb2.pyi"])
def test_generated_code_is_not_stale(tmp_path: Path, name: str) -> None:
    arguments = [
        "protoc",
        f"-I{WIRE}",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
        str(WIRE / "edgelam.proto"),
    ]
    assert protoc.main(arguments) == 0
    assert (tmp_path / name).read_text() == (WIRE / name).read_text(), "run `make protos`"


def test_every_field_kind_and_method_has_a_comment() -> None:
    comments = dict(declared())
    assert len(comments) > 150, "the .proto was read"
    assert [name for name, comment in comments.items() if not comment] == []


def test_the_page_has_the_tables_of_the_declaration() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run `make protos`"
    assert page(text.replace("| 7 | `ACT` |", "| 70 | `ACT` |")) == text, "the page would be put right"


def test_the_page_has_the_limits_of_the_code() -> None:
    mebibytes = {"header": MAX_HEADER_BYTES, "gRPC message": MESSAGE_BYTES}
    expected = [
        *(f"| {what} | {size >> 20} MiB |" for what, size in mebibytes.items()),
        f"| chunk | {MIN_CHUNK_BYTES >> 10} KiB (but for a tensor's last) to {MAX_CHUNK_BYTES >> 20} MiB |",
        f"| hub, echo | {LIMITS.most_bytes >> 20} MiB and {LIMITS.most_s:g} s per call, {LIMITS.places.most} calls at a time, one per node |",
        f"chooses their size: {CHUNK_BYTES >> 10} KiB",
        f"each end pings every {DEFAULT_TIMING.ping_every_s:g} s",
    ]
    text = PAGE.read_text(encoding="utf-8")
    assert [words for words in expected if words not in text] == []
