"""The install script for boards and its systemd units, as far as that goes without installing."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edgelam_fl.cli.main import app, exit_code
from tools.board_lock import split_lock

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "clients" / "install.sh"
UNITS = sorted((ROOT / "clients" / "systemd").glob("*.service"))
SHELL_SCRIPTS = [
    SCRIPT,
    ROOT / "tools" / "setup.sh",
    ROOT / "tools" / "environment.sh",
    ROOT / "tools" / "clean-container",
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux machines")


def install(
    *options: str, path: Path | None = None, home: Path, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    """Runs the script. `path`: a folder of programs that stand before the machine's own."""
    environment = {"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin", "HOME": str(home)}
    command = ["/bin/sh", str(script), *options]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=60, check=False)


def programs(folder: Path, scripts: dict[str, str]) -> Path:
    """Stand-ins of one line each: a script cannot be given another machine otherwise."""
    folder.mkdir()
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


# ---------------------------------------------------------------- what the script refuses, before it changes anything

OLD = dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), "echo Python 3.9.2; exit 1")
RISCV = {"uname": '[ "$1" = -s ] && echo Linux || echo riscv64'}


@pytest.mark.parametrize(
    ("options", "scripts", "says"),
    [
        (["--join", "edgelam1/x"], {}, "services that start at boot need root: sudo sh clients/install.sh"),
        ([], {"getconf": "echo 32"}, "this system is 32-bit (a 64-bit kernel does not help)"),
        ([], RISCV, "riscv64 is not supported"),
        (["--board", "pi9"], {}, "--board = pi9 must be pi4, pi5, jetson, arm64 or x86"),
        (["--data", "none.jsonl"], {}, "--data = none.jsonl must be a file that can be read"),
        (["--join"], {}, "--join needs a value"),
        (["--jion", "x"], {}, "unknown option --jion"),
        (["--join", 'a"b'], {}, 'a"b: no option of a service may hold quotes'),
        (["--serve", "a", "--address", "$(id)"], {}, "$(id): no option of a service may hold quotes"),
        (["--", "--tag", "a\nb"], {}, "no option of a service may hold quotes"),
        ([], {"awk": "echo 500"}, "500 MB of memory; a node needs at least 800 MB"),
        ([], OLD, "no usable Python 3.11 to 3.13 (here: Python 3.9.2)"),
    ],
)
def test_it_refuses(tmp_path: Path, options: list[str], scripts: dict[str, str], says: str) -> None:
    path = programs(tmp_path / "bin", {"id": "echo 1000", **scripts})
    done = install(*options, path=path, home=tmp_path)
    assert done.returncode == 1, done.stderr
    assert says in done.stderr
    assert not (tmp_path / ".local").exists()


def test_without_a_clone_it_asks_for_a_wheel_and_takes_the_one_beside_it(tmp_path: Path) -> None:
    assert exit_code(app, "edgelam", ["examples", str(tmp_path / "share")]) == 0
    script = tmp_path / "share" / "boards" / "clients" / "install.sh"
    path = programs(tmp_path / "bin", {"id": "echo 1000", "awk": "echo 500"})
    alone = install(path=path, home=tmp_path, script=script)
    assert alone.returncode == 1
    assert "there is no checkout here: copy the wheel" in alone.stderr
    (tmp_path / "share" / "edgelam_fl-0.2.0-py3-none-any.whl").touch()
    beside = install(path=path, home=tmp_path, script=script)
    assert "no checkout" not in beside.stderr
    assert "500 MB of memory; a node needs at least 800 MB" in beside.stderr, "it went on to the checks of the machine"


def test_help_is_the_scripts_own_beginning(tmp_path: Path) -> None:
    done = install("--help", home=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Makes this machine a node of a federation")
    assert done.stdout.rstrip().endswith("with options to change them.")


def test_the_tested_torch_of_every_board_is_one_that_the_package_takes() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    torch = next(each for each in map(Requirement, needs) if each.name == "torch")
    known = re.findall(r"\bboard=(\w+)", SCRIPT.read_text(encoding="utf-8"))
    assert set(known) == {"pi4", "pi5", "jetson", "arm64", "x86"}
    for board in known:
        pins = [
            line
            for line in (ROOT / "constraints" / f"{board}.txt").read_text(encoding="utf-8").splitlines()
            if not line.startswith("#")
        ]
        (version,) = re.findall(r"^torch==([0-9.]+)$", "\n".join(pins), re.MULTILINE)
        assert torch.specifier.contains(version), board


# ---------------------------------------------------------------- the services

# Of a service that is taken over: what else on the machine it cannot see or do. `systemd-analyze security` explains each.
CONFINED = {
    "User": "edgelam", "UMask": "0077", "NoNewPrivileges": "yes", "CapabilityBoundingSet": "", "ProtectSystem": "strict",
    "ProtectHome": "read-only", "PrivateTmp": "yes", "PrivateDevices": "yes", "PrivateUsers": "yes", "RemoveIPC": "yes",
    "ProtectProc": "invisible", "ProtectKernelTunables": "yes", "ProtectKernelModules": "yes", "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes", "ProtectClock": "yes", "ProtectHostname": "yes", "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes", "RestrictSUIDSGID": "yes", "LockPersonality": "yes", "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service", "SystemCallErrorNumber": "EPERM",
}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_s20_a_service_is_confined(unit: Path) -> None:
    lines = unit.read_text(encoding="utf-8").splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert {key: found.get(key) for key in CONFINED} == CONFINED


def test_options_reach_the_service_word_by_word() -> None:
    """systemd reads the value from its file, in single quotes, and splits it at $EDGELAM_OPTIONS as a shell splits words."""
    words = ["--data", "/my data/a.jsonl", "--tag", "ward;3", "*", "--name", "#1 %h"]
    functions = re.search(r"^say\(\).*?^absolute", SCRIPT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert functions
    program = functions[0].removesuffix("absolute") + 'for word; do quote "$word"; done'
    done = subprocess.run(["/bin/sh", "-c", program, "sh", *words], capture_output=True, text=True, check=True)
    assert "'" not in done.stdout
    assert shlex.split(done.stdout) == words


# ---------------------------------------------------------------- tools that not every machine has


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    assert "/opt/edgelam/bin/edgelam " in text
    (tmp_path / unit.name).write_text(text.replace("/opt/edgelam/bin/edgelam ", "/bin/true "), encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ---------------------------------------------------------------- the lock


def locked(file: str) -> dict[str, tuple[str, list[str]]]:
    """Returns (version, hashes) by package."""
    text = (ROOT / "constraints" / file).read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)), "each entry has hashes"
    return {name: (version, hashes.split()) for name, version, hashes in entries}


def test_the_lock_has_all_that_a_board_needs_in_the_tested_versions() -> None:
    """Stale: python -m tools.board_lock."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = locked("boards.lock") | locked("torch-aarch64.lock")
    for need in map(Requirement, needs):
        assert need.specifier.contains(found[need.name][0]), need
    tested = (ROOT / "constraints" / "tested.txt").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", tested, re.MULTILINE))
    other = {
        name: (version, versions[name])
        for name, (version, _) in found.items()
        if versions.get(name, version) != version
    }
    assert other == {}
    boards = {file.stem for file in (ROOT / "constraints").glob("*.txt")} - {"tested", "torch", "x86"}
    for board in boards:
        assert f"torch=={found['torch'][0]}" in (ROOT / "constraints" / f"{board}.txt").read_text(encoding="utf-8")


def test_a_lock_is_split_into_torch_and_the_rest() -> None:
    text = "# a head\nabc==1 \\\n    --hash=sha256:1\ntorch==2 \\\n    --hash=sha256:2 \\\n    --hash=sha256:3\ntorchx==4 \\\n    --hash=sha256:5\n"
    rest, torch = split_lock(text)
    assert [line for line in rest.splitlines() if not line.startswith("#")] == [
        "abc==1 \\", "    --hash=sha256:1", "torchx==4 \\", "    --hash=sha256:5",
    ]  # fmt: skip
    assert [line for line in torch.splitlines() if not line.startswith("#")] == [
        "torch==2 \\", "    --hash=sha256:2 \\", "    --hash=sha256:3",
    ]  # fmt: skip


def test_uv_itself_comes_by_its_hashes(tmp_path: Path) -> None:
    """uv checks the hashes of all other packages, so pip has to check those of uv."""
    said = tmp_path / "said"
    python = programs(tmp_path / "bin", {"python": f'echo "$@" >>{said}'}) / "python"
    program = f". tools/environment.sh; venv={tmp_path} constraints= lock=constraints/boards.lock; make_environment"
    subprocess.run(["/bin/sh", "-euc", program], cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, check=True)
    assert python.exists()
    (installed,) = [line for line in said.read_text(encoding="utf-8").splitlines() if line.startswith("-m pip install")]
    assert installed.endswith(f"--require-hashes --no-deps -r {tmp_path}/uv.lock")
    version, hashes = locked("boards.lock")["uv"]
    text = (tmp_path / "uv.lock").read_text(encoding="utf-8")
    assert text.split() == f"uv=={version} {' '.join(hashes)}".split()


def test_uv_unpacks_on_the_disk_that_was_checked_for_room(tmp_path: Path) -> None:
    """On Debian 13, /tmp lies in memory, of which a board has too little for PyTorch."""
    venv, said = tmp_path / ".local/share/edgelam", tmp_path / "said"
    venv.mkdir(parents=True)
    programs(venv / "bin", {"python": "", "edgelam": "", "uv": f'test -d "$TMPDIR" && echo "$TMPDIR" >>{said}'})
    done = install(path=programs(tmp_path / "bin", {"id": "echo 1000"}), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(said.read_text(encoding="utf-8").splitlines()) == {str(venv / "tmp")}
    assert not (venv / "tmp").exists()
