"""The wire's declaration: the committed code is what it generates, and every field has a comment."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc_tools import protoc

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
