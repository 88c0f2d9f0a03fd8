"""The micro-batches of an evaluation: large ones, of similar length, and enough of them to overlap."""

from __future__ import annotations

import random

import pytest

from edgelam_fl.split.driver import evaluation_batches
from edgelam_fl.tasks.base import Example


def examples(*lengths: int) -> list[Example]:
    return [Example([0] * length, [0] * length, 1) for length in lengths]


def lengths(batches: list[list[Example]]) -> list[list[int]]:
    return [[len(example.ids) for example in batch] for batch in batches]


@pytest.mark.parametrize(
    ("given", "most", "window", "expected"),
    [
        ([4, 4, 4, 4], 100, 1, [[4, 4], [4, 4]]),  # two per place in the window
        ([4, 4, 4, 4], 100, 2, [[4], [4], [4], [4]]),
        ([4] * 12, 16, 1, [[4] * 4] * 3),
        ([9, 1, 1, 9, 1, 1], 18, 1, [[1] * 4, [9], [9]]),  # padding counts, and nine tokens are nearly half
        ([50, 3], 16, 1, [[3], [50]]),  # one example is never too long
        ([], 16, 1, []),
    ],
)
def test_they_are_as_large_as_the_positions_and_the_overlap_allow(
    given: list[int], most: int, window: int, expected: list[list[int]]
) -> None:
    assert lengths(evaluation_batches(examples(*given), most, window)) == expected


def test_none_is_larger_than_allowed_and_no_example_is_lost() -> None:
    chance = random.Random(7)
    given = [chance.randint(1, 80) for _ in range(200)]
    batches = lengths(evaluation_batches(examples(*given), 320, 2))
    assert sorted(length for batch in batches for length in batch) == sorted(given)
    assert all(len(batch) * max(batch) <= 320 for batch in batches)
    assert len(batches) < 200 / 5
