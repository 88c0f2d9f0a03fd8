"""What a submitted run file names of the server's machine: folders of runs, of models and of adapters, within bounds alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from edgelam_fl.bounds import Bounds, bounds_of, operator_bounds
from edgelam_fl.cli.main import app
from edgelam_fl.config import to_toml
from edgelam_fl.errors import ConfigError
from edgelam_fl.federation.operator import Operator, prepare_operator
from edgelam_fl.federation.runs import check_run
from edgelam_fl.files import keep_private
from edgelam_fl.model.source import ModelSource
from server.app import main
from server.checks import check_config
from server.run_folder import RunFolder
from tests.support import run_config


@pytest.fixture(autouse=True)
def usual_mask() -> Iterator[None]:
    """Gives this process its own mask again: a ServerApp, which is called here, narrows it."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def server(tmp_path: Path, tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> Bounds:
    """The bounds of a server's operator, as the ServerApp finds them."""
    bounds = operator_bounds([], tmp_path / "srv" / "runs", [tiny.folder.parent])
    for key, value in bounds.environment().items():
        monkeypatch.setenv(key, value)
    return bounds


def submit(source_name: str, out: str, command: str = "run", adapter: str = "") -> None:
    """Has the ServerApp do what a submission says, as far as it gets without a SuperLink."""
    given = {
        "command": command,
        "set": "",
        "out": out,
        "adapter": adapter,
        "run-toml": to_toml(run_config(source_name)),
    }
    context: Any = SimpleNamespace(run_id=7, run_config=given)
    grid: Any = SimpleNamespace(get_node_ids=_no_grid)
    main(grid, context)


class Began(Exception):
    """The run got past its checks."""


def _no_grid() -> Any:
    raise Began


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_s6_a_submission_writes_into_no_folder_that_exists(server: Bounds, tiny: ModelSource, tmp_path: Path) -> None:
    """The attack: another run's folder, whose config.toml was replaced and whose events were appended to."""
    victims = [server.runs / "victim", tmp_path / "home"]
    for victim in victims:
        victim.mkdir(parents=True)
        (victim / "config.toml").write_text("theirs")
        (victim / "events.jsonl").write_text("theirs\n")
    before = [contents(victim) for victim in victims]
    for victim in victims:
        with pytest.raises(ConfigError, match=r"exists; give another name|outside of this server's folder for runs"):
            submit(tiny.name, str(victim))
    assert [contents(victim) for victim in victims] == before


@pytest.mark.parametrize(
    "out",
    [
        "../x",
        "a/../../x",
        "/etc/edgelam-attack",
        "..",
        ".",
        "/",
        "victim",
        "victim/adapter/mine",
        "link/x",
        "victim/chats/x",
    ],
)
def test_s6_such_a_folder_is_not_made(out: str, server: Bounds, tiny: ModelSource, tmp_path: Path) -> None:
    (server.runs / "victim" / "adapter").mkdir(parents=True)
    (server.runs / "victim" / "events.jsonl").touch()
    (tmp_path / "elsewhere").mkdir()
    (server.runs / "link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"^out = "):
        submit(tiny.name, out)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/etc/edgelam-attack").exists()


@pytest.mark.parametrize("out", ["", "mine", "of-ann/mine"])
def test_s6_a_run_gets_a_new_folder_below_the_servers_own(out: str, server: Bounds, tiny: ModelSource) -> None:
    with pytest.raises(Began):
        submit(tiny.name, out)
    assert (server.runs / (out or "flwr-7") / "config.toml").is_file()
    with pytest.raises(ConfigError, match="exists; give another name"):
        submit(tiny.name, out)


def test_s6_a_local_run_has_its_one_folder(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes have written there before; even so, no run is overwritten."""
    folder = tmp_path / "run"
    (folder / "nodes").mkdir(parents=True)
    for key, value in Bounds(run=folder).environment().items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="is not the folder that this run was started with"):
        submit(tiny.name, str(tmp_path / "other"))
    with pytest.raises(Began):
        submit(tiny.name, str(folder))
    with pytest.raises(ConfigError, match="run is the folder of another run"):
        submit(tiny.name, str(folder))


def test_s6_a_conversation_has_its_folder_in_a_run_and_an_adapter_below_the_runs(
    server: Bounds, tiny: ModelSource, tmp_path: Path
) -> None:
    run = server.runs / "mine"
    run.mkdir(parents=True)
    (run / "events.jsonl").touch()
    (tmp_path / "secret").mkdir()
    (run / "link").symlink_to(tmp_path / "secret")
    for adapter in (str(tmp_path / "secret"), str(run / "link"), f"{run}/../../secret"):
        with pytest.raises(ConfigError, match=r"^adapter = .* is outside of this server's folder for runs"):
            submit(tiny.name, str(run / "chats" / "a"), "chat", adapter)
    with pytest.raises(ConfigError, match="must be in the folder chats of a run"):
        submit(tiny.name, "new/chats/a", "chat", str(run / "adapter"))
    with pytest.raises(Began):
        submit(tiny.name, str(run / "chats" / "a"), "chat", str(run / "adapter"))


def test_s4_a_model_is_read_from_folders_that_the_operator_offered(tiny: ModelSource, tmp_path: Path) -> None:
    """Else a submission could have the hub serve any folder of the server."""
    config = run_config(tiny.name)
    assert check_config(config, Bounds(models=(tiny.folder.parent,))).source.digest == tiny.digest
    link = tmp_path / "models" / "link"
    link.parent.mkdir()
    link.symlink_to(tiny.folder)
    for name in (tiny.name, str(link), f"{link.parent}/../models/link"):
        with pytest.raises(ConfigError, match=r"its operator did not offer: `edgelam server --models DIR`"):
            check_config(run_config(name), Bounds(models=(tmp_path / "models",)))
        with pytest.raises(ConfigError, match="its operator did not offer"):
            check_config(run_config(name), bounds_of({}))


def test_bounds_reach_another_process_by_the_environment(tmp_path: Path) -> None:
    given = Bounds(packages=("a", "b.c"), runs=tmp_path / "r", models=(tmp_path / "m", tmp_path / "n"))
    assert bounds_of(given.environment()) == given
    assert bounds_of(Bounds().environment()) == Bounds()
    local = Bounds(folder=tmp_path, run=tmp_path / "run")
    assert bounds_of(local.environment()) == local
    assert bounds_of({}) == Bounds(runs=Path("runs"), models=(Path("models"),))


def test_a_run_is_submitted_to_a_folder_that_the_server_will_make(tiny: ModelSource, tmp_path: Path) -> None:
    """Whatever directory the command is typed in."""
    config = run_config(tiny.name)
    prepare_operator(tmp_path / "operator", "127.0.0.1:1", runs=tmp_path / "runs")
    operator = Operator("127.0.0.1:1", tmp_path / "operator")
    assert check_run(config, "mine", None, operator).parent == tmp_path / "runs"
    assert check_run(config, "mine", tmp_path / "runs/a/b", operator) == tmp_path / "runs/a/b"
    with pytest.raises(ConfigError, match="where this server keeps runs"):
        check_run(config, "mine", tmp_path / "b", operator)
    assert check_run(config, "mine", tmp_path / "b") == tmp_path / "b"


def test_s20_what_a_server_and_a_run_leave_is_their_owners_alone(
    server: Bounds, tiny: ModelSource, tmp_path: Path
) -> None:
    with pytest.raises(Began):
        submit(tiny.name, "mine")
    found = [tmp_path / "srv", *(tmp_path / "srv").rglob("*")]
    assert {path.name for path in found} >= {"runs", "mine", "config.toml", "events.jsonl", "report.html"}
    assert not [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_s20_children_inherit_the_mask(tmp_path: Path) -> None:
    keep_private()
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")] == [0o600, 0o700]


def test_s6_a_run_folder_is_written_once(tiny: ModelSource, tmp_path: Path) -> None:
    spec = check_config(run_config(tiny.name))
    RunFolder(tmp_path / "run", spec)
    with pytest.raises(ConfigError, match="nothing is ever overwritten"):
        RunFolder(tmp_path / "run", spec)


def test_s9_what_people_share_names_nobodys_home(
    server: Bounds, tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model lies in the user's home, and so do the runs: neither path stands in what a run leaves."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").symlink_to(tiny.folder.parent)
    name = f"{tmp_path}/models/{tiny.folder.name}"
    monkeypatch.setenv("EDGELAM_MODELS", str(tiny.folder.parent))
    with pytest.raises(Began):
        submit(name, "mine")
    left = {file.name: file.read_text() for file in (server.runs / "mine").iterdir() if file.is_file()}
    assert {"config.toml", "events.jsonl", "report.html"} <= left.keys()
    assert f'name = "~/models/{tiny.folder.name}"' in left["config.toml"]
    assert not [file for file, text in left.items() if str(tmp_path) in text]


def test_s9_a_failed_run_names_nobodys_home(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RunFolder(tmp_path / "run", check_config(run_config(tiny.name)))
    folder.fail(f"{tmp_path}/secret cannot be read; {tmp_path}-else too; {tmp_path}")
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert f"~/secret cannot be read; {tmp_path}-else too; ~" in events


@pytest.mark.parametrize(
    "command",
    [
        ["server"], ["client", "--server", "127.0.0.1:1"], ["demo"], ["bench", "matrix.toml"], ["chat", "run"],
        ["run", "run.toml", "--local", "1", "--data", "a.jsonl"], ["run", "run.toml", "--server", "127.0.0.1:1"],
    ],
    ids=lambda command: " ".join(command[:1] + command[2:3]),
)  # fmt: skip
def test_s20_every_command_that_leaves_files_of_a_run_keeps_them_private(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def narrowed() -> None:
        raise Began

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").touch()
    monkeypatch.setattr("edgelam_fl.files.keep_private", narrowed)
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, Began), done.output
    assert list(tmp_path.iterdir()) == [tmp_path / "run.toml"]
