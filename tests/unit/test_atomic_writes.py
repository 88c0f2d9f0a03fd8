"""Files that are replaced in one step, also by several threads of a process at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgelam_fl.files import write_atomically, write_private


@pytest.mark.parametrize("write", [write_atomically, write_private])
def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path, write: object) -> None:
    assert callable(write)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: write(tmp_path / "note", str(number) * 100), range(400)))
    content = (tmp_path / "note").read_text()
    assert content in {str(number) * 100 for number in range(400)}, "parts of two"
    assert [file.name for file in tmp_path.iterdir()] == ["note"]
