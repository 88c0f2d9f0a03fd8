"""What Flower is handed: the App's files and nothing else."""

from __future__ import annotations

from pathlib import Path

from edgelam_fl.federation.submission import Submission

ROOT = Path(__file__).parents[2]


def _files(folder: Path, pattern: str) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob(pattern) if file.is_file()}


def test_flower_is_handed_the_app_alone(tmp_path: Path) -> None:
    (tmp_path / "app" / "server").mkdir(parents=True)
    (tmp_path / "app" / "server" / "of_an_earlier_version.py").touch()
    app = Submission("127.0.0.1:1", tmp_path).app()
    parts = {f"{part}/{file}" for part in ("server", "clients", "strategies") for file in _files(ROOT / part, "*.py")}
    assert {file for file in _files(app, "*") if file.endswith(".py")} == parts
    assert (app / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()
    assert not list(app.rglob("__pycache__"))
