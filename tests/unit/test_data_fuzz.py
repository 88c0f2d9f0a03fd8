"""A short form of `python -m benchmarks.data_files`, from fixed seeds."""

from __future__ import annotations

import pytest

from tests.data_fuzz import KINDS, fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_only_data_errors_with_their_places_come_out_of_a_file(kind: str) -> None:
    tally = fuzz(kind, 75, from_seed=7)
    assert not tally.problems, tally.problems[:3]
    assert tally.files >= 75
    assert len(tally.outcomes) > 4, "files of many faults"
