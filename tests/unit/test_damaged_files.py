"""Files that users hand over, damaged in the ways that parsers do not expect: one message with the file, never a raw error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgelam_fl.bench.matrix import read_matrix
from edgelam_fl.config import read_run_file
from edgelam_fl.errors import UsageError
from edgelam_fl.federation.plan_view import read_profiles
from edgelam_fl.model.adapter import read_peft_folder
from edgelam_fl.simulation.nodes_file import read_federation
from edgelam_fl.telemetry.events import EventTail, read_events
from edgelam_fl.telemetry.summary import read_summary
from testbed.shapes import read_testbed

CONTENTS = {
    "nothing": b"",
    "other bytes": b"\xff\xfe\x00\xd8\n",
    "deep nesting": b"[" * 100_000 + b"\n",
    "a deep value": b"a = " + b"[" * 100_000 + b"\n",
    "endless number": b"9" * 5000 + b"\n",
    "an endless value": b"a = " + b"9" * 5000 + b"\n",
    "a list": b"[1, 2]\n",
    "null": b"null\n",
    "a text": b'"x"\n',
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "run file": ("run.toml", read_run_file),
    "matrix": ("matrix.toml", read_matrix),
    "testbed": ("testbed.toml", read_testbed),
    "events": ("events.jsonl", lambda path: list(read_events(path))),
    "events as they come": ("events.jsonl", lambda path: EventTail(path).poll()),
    "summary": ("summary.json", read_summary),
    "profiles": ("profiles.json", read_profiles),
    "events as profiles": ("events.jsonl", read_profiles),
    "adapter": ("adapter_model.safetensors", lambda path: read_peft_folder(path.parent)),
    "adapter's config": ("adapter_config.json", lambda path: read_peft_folder(path.parent)),
    "federation": ("federation.json", lambda path: read_federation(path.parent)),
}
ABLE = {("run file", "nothing"), ("matrix", "nothing"), ("events", "nothing"), ("events as they come", "nothing")}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_damaged_file_is_named(tmp_path: Path, reader: str, content: str) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(CONTENTS[content])
    if (reader, content) in ABLE:
        read(tmp_path / name)
        return
    with pytest.raises(UsageError, match=tmp_path.name) as caught:
        read(tmp_path / name)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 1000
