"""Files that are replaced in one step, also by several threads of a process at a time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgelam_fl.files import Hold, is_held, write_atomically, write_private


@pytest.mark.parametrize("write", [write_atomically, write_private])
def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path: Path, write: object) -> None:
    assert callable(write)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: write(tmp_path / "note", str(number) * 100), range(400)))
    content = (tmp_path / "note").read_text()
    assert content in {str(number) * 100 for number in range(400)}, "parts of two"
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    assert is_held(tmp_path) is None, "nobody ever did"
    code = "import sys; from pathlib import Path; from edgelam_fl.files import Hold; h = Hold(Path(sys.argv[1])); print('x', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "x\n"
    assert is_held(tmp_path) is True
    with pytest.raises(BlockingIOError):
        Hold(tmp_path)
    holder.kill()
    holder.communicate()
    assert is_held(tmp_path) is False
    Hold(tmp_path).release()
