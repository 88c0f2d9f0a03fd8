"""A node's measured profile: what survives JSON, and what is left out if it cannot be measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from edgelam_fl.addresses import free_port, split_address
from edgelam_fl.doctor.measured import measured
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.hub import echo
from edgelam_fl.node.profile.data import Profile
from edgelam_fl.node.profile.measure import disk_write_bytes_per_s
from tests.support import grpc_server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    with grpc_server([echo.make_service(tmp_path)]) as port:
        yield f"127.0.0.1:{port}"


def test_a_profile_with_a_link_survives_json(hub: str, cache: Path) -> None:
    said: list[str] = []
    findings, profile = measured("", split_address(hub, "hub"), said.append)
    assert findings == []
    assert profile is not None
    assert profile.link is not None
    assert said == ["measuring the disk", f"measuring the link to {hub}"]
    assert Profile.model_validate_json(profile.model_dump_json()) == profile
    assert list(cache.iterdir()) == [], "what the disk was measured with is gone"


def test_without_a_hub_the_rest_is_measured_and_the_fault_found() -> None:
    findings, profile = measured("", ("127.0.0.1", free_port()), lambda _: None, hub_answer_s=0.5)
    assert [finding.state for finding in findings] == ["problem"]
    assert "--data-plane" in findings[0].fix
    assert profile is not None
    assert profile.link is None


def test_a_model_that_is_not_here_is_a_note() -> None:
    findings, profile = measured("no/such-model", None, lambda _: None)
    assert [finding.state for finding in findings] == ["note"]
    assert profile is not None
    assert (profile.model, profile.layer_seconds) == ("", {})


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="EDGELAM_CACHE"):
        disk_write_bytes_per_s(tmp_path / "file" / "cache")


def test_impossible_figures_are_refused() -> None:
    good = {"name": "pi", "memory_free_bytes": 0, "cpu_threads": 1, "disk_free_bytes": 0}
    assert Profile.model_validate(good).link is None
    for wrong in ({"memory_free_bytes": -1}, {"cpu_threads": 0}, {"layer_seconds": {128: {"fp32/fp32": 0}}}):
        with pytest.raises(ValidationError):
            Profile.model_validate(good | wrong)
