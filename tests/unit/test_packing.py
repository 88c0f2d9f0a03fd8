"""Packing: rows of several examples, none too long, never more positions than a row per example; and how a host reads them."""

from __future__ import annotations

import random

import pytest

from edgelam_fl.config import TaskSection
from edgelam_fl.errors import ConfigError, ProtocolError
from edgelam_fl.split.host import check_segments
from edgelam_fl.tasks.base import Example, segments_of
from edgelam_fl.tasks.causal_lm import make_units
from edgelam_fl.tasks.kinds import check_task
from edgelam_fl.tasks.masking import IGNORED
from edgelam_fl.tasks.packing import packed_rows
from edgelam_fl.wire import edgelam_pb2 as pb


def examples(*lengths: int) -> list[Example]:
    """Returns examples whose every token is labelled."""
    return [Example(ids, ids, length - 1) for length in lengths for ids in [list(range(length))]]


@pytest.mark.parametrize(
    ("lengths", "most", "rows"),
    [
        ([9, 3, 3, 3], 9, [[0], [1, 2, 3]]),
        ([5, 4, 3, 2, 1], 20, [[0, 1, 2, 3, 4]]),
        ([10, 10, 10], 20, [[0], [1], [2]]),  # two rows would be of 20: more positions, not fewer
        ([7], 9, [[0]]),
    ],
)
def test_rows_hold_what_fits(lengths: list[int], most: int, rows: list[list[int]]) -> None:
    assert sorted(sorted(row) for row in packed_rows(lengths, most)) == rows


def test_packing_never_adds_positions_and_loses_no_example() -> None:
    drawn = random.Random(1)
    fewer = 0
    for _ in range(300):
        lengths = [drawn.randint(1, 64) for _ in range(drawn.randint(1, 24))]
        rows = packed_rows(lengths, 64)
        assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
        widths = [sum(lengths[number] for number in row) for row in rows]
        assert max(widths) <= 64
        assert len(rows) * max(widths) <= len(lengths) * max(lengths)
        fewer += len(rows) < len(lengths)
    assert fewer > 250


def test_a_packed_micro_batch_has_the_labels_of_its_examples() -> None:
    """But for each one's first token, which nothing predicts: in the middle of a row something would."""
    (unit,) = make_units(examples(6, 2, 3), 1, packed=8)
    assert unit.inputs.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]]
    assert unit.labels.tolist() == [[IGNORED, 1, 2, 3, 4, 5], [IGNORED, 1, 2, IGNORED, 1, IGNORED]]
    assert (unit.row_lengths, unit.count, unit.segments) == ([6, 5], 5 + 1 + 2, [[6], [3, 2]])


def test_examples_of_one_length_stay_in_rows_of_their_own() -> None:
    (unit,) = make_units(examples(8, 8), 1, packed=12)
    assert (unit.row_lengths, list(unit.segments)) == ([8, 8], [])


def test_a_host_reads_whose_tokens_are_in_a_row() -> None:
    plan = pb.Plan(task=pb.TaskSettings(packing=True))
    header = pb.Header(row_lengths=[6, 5], segment_lengths=[6, 3, 2])
    check_segments(header, plan)
    assert segments_of(header.segment_lengths, header.row_lengths) == [[6], [3, 2]]
    assert segments_of([], [6, 5]) == []
    for lengths in ([6], [6, 3], [6, 3, 3], [5, 3, 3], [6, 3, 2, 1], [6, 0, 5], [11]):
        with pytest.raises(ProtocolError, match="do not fill rows"):
            check_segments(pb.Header(row_lengths=[6, 5], segment_lengths=lengths), plan)
    with pytest.raises(ProtocolError, match="the plan packs none"):
        check_segments(header, pb.Plan())


def test_what_packing_cannot_be_combined_with() -> None:
    with pytest.raises(ConfigError, match=r"packing = true is for task.kind = 'causal-lm', and 'classification'"):
        check_task(TaskSection(kind="classification", classes=("a", "b"), packing=True))
    with pytest.raises(ConfigError, match=r"packing = true cannot be combined with task.weighting = 'examples'"):
        check_task(TaskSection(packing=True, weighting="examples"))
