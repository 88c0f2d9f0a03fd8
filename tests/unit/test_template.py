"""Processes forked from the template: they are what `python -m` starts, and end as its child would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.template import can_fork
from tests.support import WAIT_S

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not can_fork(), reason="only Linux forks nodes' processes")]
PROGRAM = """
import os, sys, time
print(sys.argv[1:], os.environ["WORD"], os.getsid(0) == os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that prints, sleeps as long as its argument says, and exits with 3."""
    (tmp_path / "forked_program.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WORD", "today's")
    return "forked_program"


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_runs_the_module_with_its_arguments_and_this_environment(module: str, tmp_path: Path) -> None:
    child = Child("program", [sys.executable, "-m", module, "0", "more"], tmp_path / "log", forked=True)
    until(child.ended)
    assert child.ended() == "program ended with status 3: ['0', 'more'] today's True"


def test_it_ends_when_asked(module: str, tmp_path: Path) -> None:
    child = Child("program", [sys.executable, "-m", module, "600"], tmp_path / "log", forked=True)
    until(lambda: (tmp_path / "log").read_text())
    end_all([child])
    assert f"status {-signal.SIGTERM}" in child.ended()
    assert not psutil.pid_exists(child.pid) or psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE


def test_it_ends_with_its_parent_however_that_ends(module: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"  # that it is not guarded against being imported does not matter
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from edgelam_fl.federation.child import Child\n"
        "print('once', flush=True)\n"
        f"command = [sys.executable, '-m', {module!r}, '600']\n"
        f"child = Child('program', command, Path({str(tmp_path / 'log')!r}), forked=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "once\n"
        pid = int(parent.stdout.readline())
        parent.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_collecting_garbage_in_a_fork_copies_nothing_of_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counting_program.py").write_text("import gc; print(gc.get_freeze_count() > 100_000)", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("program", [sys.executable, "-m", "counting_program"], tmp_path / "log", forked=True)
    until(child.ended)
    assert child.ended() == "program ended with status 0: True"


def test_the_template_has_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads do not survive a fork, and what they hold then stays locked; gRPC's abort it."""
    program = "import os; print(len(os.listdir(f'/proc/{os.getppid()}/task')), 'thread')"
    (tmp_path / "counting_program.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("program", [sys.executable, "-m", "counting_program"], tmp_path / "log", forked=True)
    until(child.ended)
    assert child.ended() == "program ended with status 0: 1 thread"


def test_nodes_import_bitsandbytes_only_for_its_kernels_and_never_torchs_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import sys
from edgelam_fl.node.lean import import_libraries
import_libraries()
from edgelam_fl.model.bases import base_problem
heavy = ("peft", "bitsandbytes", "torch._inductor.compile_fx", "scipy", "sklearn", "sqlalchemy")
print([name for name in heavy if name in sys.modules], base_problem("nf4") or "nf4 computes",
      [name for name in heavy if name in sys.modules])
"""
    (tmp_path / "importing_program.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("program", [sys.executable, "-m", "importing_program"], tmp_path / "log", forked=True)
    until(child.ended)
    assert child.ended().endswith("['peft'] nf4 computes ['peft', 'bitsandbytes']")
