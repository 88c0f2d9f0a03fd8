"""The benchmark of links runs at its smallest, on the federation that tests share: its own is of the same class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks import common, links
from tests.integration.federation import Federation
from tests.integration.test_benchmarks import check_result

pytestmark = pytest.mark.processes


def test_smoke(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common.main("links", partial(links.measure, federation=federation), None, ["--smoke"])
    check_result("links", capfd.readouterr().out)
