"""`edgelam` as a shell meets it: by `python -m`, with -v, without colours, with completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgelam_fl.cli.main import app, exit_code

MISTAKE = ["run", "nowhere.toml"]


def edgelam(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Types `python -m edgelam_fl` in a folder that is also the home."""
    given = {**os.environ, "HOME": str(folder), **environment}
    command = [sys.executable, "-m", "edgelam_fl", *words]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=120, check=False)


def test_verbose_says_where_an_error_arose(tmp_path: Path) -> None:
    done = edgelam(tmp_path, *MISTAKE, "-v", FORCE_COLOR="1", NO_COLOR="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "edgelam:" in last
    assert "no run file at nowhere.toml" in last
    assert "\x1b[31m" not in last
    assert "\x1b[1;31m" not in last, "NO_COLOR wins"


def test_without_it_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(app, "edgelam", MISTAKE) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    asked = {"_EDGELAM_COMPLETE": "complete_bash"}
    done = edgelam(tmp_path, **{**asked, "COMP_WORDS": "edgelam cli", "COMP_CWORD": "1"})
    assert done.stdout.split() == ["client"]
    done = edgelam(tmp_path, **{**asked, "COMP_WORDS": "edgelam run --det", "COMP_CWORD": "2"})
    assert done.stdout.split() == ["--detach"]


def test_completion_installs_itself(tmp_path: Path) -> None:
    done = edgelam(tmp_path, "--install-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "edgelam" in (tmp_path / ".bash_completions" / "edgelam.sh").read_text(encoding="utf-8")
