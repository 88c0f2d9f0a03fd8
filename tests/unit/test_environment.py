"""The environment that processes get is made: whatever the shell's variables say, they work the same."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from requests.utils import should_bypass_proxies

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.federation.child import Child, end_all
from edgelam_fl.federation.environment import (
    check_interpreter,
    child_environment,
    proxies_set,
    settle_process,
    unusable_proxies,
    without_proxies,
    without_proxy,
)
from edgelam_fl.files import cache_folder, now_in_a_name


def bypassed(environment: dict[str, str], host: str) -> bool:
    return bool(should_bypass_proxies(f"http://[{host}]" if ":" in host else f"http://{host}", environment["no_proxy"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "server.lan"])
@pytest.mark.parametrize("set_before", ["", "intranet.example", " intranet.example , 10.0.0.1"])
def test_proxies_are_gone_around(monkeypatch: pytest.MonkeyPatch, host: str, set_before: str) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", set_before)
    made = child_environment("server.lan")
    assert made["http_proxy"] == "http://127.0.0.1:9"  # downloads still use it
    assert bypassed(made, host)
    assert not bypassed(made, "huggingface.co")
    assert made["no_proxy"] == made["NO_PROXY"] == made["no_grpc_proxy"]
    assert {name.strip() for name in set_before.split(",") if name.strip()} <= set(made["no_proxy"].split(","))


def test_a_proxy_for_nothing_stays_one() -> None:
    assert set(without_proxy({"no_proxy": "a, *"}).values()) == {"*"}


def test_what_reaches_the_server_alone_knows_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx, of Flower's commands, fails at a SOCKS proxy even for an address that needs none."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert not {"ALL_PROXY", "all_proxy"} & without_proxies(child_environment()).keys()


def test_a_socks_proxy_needs_a_package() -> None:
    proxies = {"ALL_PROXY": "socks5h://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    assert unusable_proxies(proxies, can_socks=False) == ["ALL_PROXY"]
    assert not unusable_proxies(proxies, can_socks=True)


def test_a_python_without_docstrings_is_refused() -> None:
    check_interpreter(1)
    with pytest.raises(EnvironmentProblem, match="unset PYTHONOPTIMIZE"):
        check_interpreter(2)


def test_proxies_are_named_without_their_passwords() -> None:
    assert proxies_set({"HTTPS_PROXY": "http://user:secret@proxy:3128", "http_proxy": "", "no_proxy": "x"}) == [
        "HTTPS_PROXY"
    ]


def test_what_shells_set_for_people_does_not_reach_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = {
        "FORCE_COLOR": "1", "COLUMNS": "20", "PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX", "RAY_ADDRESS": "10.0.0.1:1",
        "FLWR_DATABASE": "/nowhere/x", "FLWR_TELEMETRY_ENABLED": "1", "PYTHONINSPECT": "1",
    }  # fmt: skip
    for name, value in {**odd, "OMP_NUM_THREADS": "3", "FLWR_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    code = (
        "import json, os, sys; print('é', file=open(sys.argv[1] + '.txt', 'w')); "
        "json.dump([dict(os.environ), sys.stdout.encoding], open(sys.argv[1], 'w'))"
    )
    child = Child("child", [sys.executable, "-c", code, str(tmp_path / "é")], tmp_path / "child.log")
    child._process.wait()
    end_all([child])
    inside, encoding = json.loads((tmp_path / "é").read_text(encoding="utf-8"))
    assert (tmp_path / "é.txt").read_text(encoding="utf-8") == "é\n"
    assert encoding.lower() == "utf-8"
    assert inside["OMP_NUM_THREADS"] == "3"
    assert inside["FLWR_HOME"] == str(tmp_path)
    assert inside["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (
        not {"FORCE_COLOR", "COLUMNS", "PYTHONIOENCODING", "RAY_ADDRESS", "FLWR_DATABASE", "PYTHONINSPECT"}
        & inside.keys()
    )


def test_folders_are_absolute_in_a_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", ".")
    assert child_environment()["TMPDIR"] == str(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_user_without_a_home_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    for name in ("HOME", "EDGELAM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = child_environment()["HOME"]
    assert Path(home).is_absolute()
    assert cache_folder() == Path(home) / ".cache" / "edgelam-fl"


@pytest.mark.parametrize(
    ("shell", "mode"), [(0o777, 0o600), (0o000, 0o644), (0o022, 0o644), (0o027, 0o640), (0o077, 0o600)]
)
def test_files_can_be_read_here_and_changed_by_nobody_else(tmp_path: Path, shell: int, mode: int) -> None:
    before, environment = os.umask(shell), dict(os.environ)
    try:
        settle_process()
        subprocess.run(["touch", str(tmp_path / "file")], check=True)
    finally:
        os.umask(before)
        os.environ.clear()
        os.environ.update(environment)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_two_moments_of_a_second_have_two_names() -> None:
    names: set[str] = set()
    while len(names) < 3:  # ends with the third millisecond
        names.add(now_in_a_name())
    assert all(len(name) == len("20261130-024212-520") for name in names)
