"""The words of split.host_mode and split.labels: what follows from each, and that no other module tells them apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgelam_fl.config import parse_run_file
from edgelam_fl.errors import ConfigError, Refused
from edgelam_fl.plan.modes import (
    ALL_DEVICES,
    COPIES,
    HOST_MODES,
    JOINT,
    LABEL_PLACES,
    SEQUENTIAL,
    HostMode,
    Turn,
    host_mode,
    label_place,
)
from edgelam_fl.wire import edgelam_pb2 as pb

ROOT = Path(__file__).parents[2]
FOLDERS = ("edgelam_fl", "server", "strategies", "clients")
HOME = "edgelam_fl/plan/modes.py"
KEYS = {"host_mode", "labels"}
WORDS = {*HOST_MODES, *LABEL_PLACES} - {"device"}  # "device" is a node's role too, so it counts beside a key only

LABELS = {0: [3, 0], 1: [5, 2], 2: [0, 4]}  # of each device, in each step
TOTALS = [pb.StepTotal(labels=8, members=[0, 1]), pb.StepTotal(labels=6, members=[1, 2])]


def turns(mode: HostMode, totals: list[pb.StepTotal], seed: int = 1, first_step: int = 0) -> list[Turn]:
    return mode.turns(totals, lambda index, step: LABELS[index][step], seed, first_step)


def test_a_joint_turn_is_a_step_of_all_devices_with_labels() -> None:
    assert turns(JOINT, TOTALS) == [Turn(0, (0, 1), 8), Turn(1, (1, 2), 6)]
    assert JOINT.turn_index(2) == ALL_DEVICES


def test_sequential_turns_are_one_per_device_in_an_order_that_step_and_seed_decide() -> None:
    drawn = turns(SEQUENTIAL, TOTALS)
    assert [turn.step for turn in drawn] == [0, 0, 1, 1]
    assert sorted(turn.members for turn in drawn) == [(0,), (1,), (1,), (2,)]
    assert all(turn.labels == LABELS[turn.members[0]][turn.step] for turn in drawn)
    assert turns(SEQUENTIAL, TOTALS) == drawn
    orders = {tuple(turn.members for turn in turns(SEQUENTIAL, TOTALS, seed)) for seed in range(8)}
    later = {tuple(turn.members for turn in turns(SEQUENTIAL, TOTALS, 1, first)) for first in range(8)}
    assert len(orders) == len(later) == 4
    assert SEQUENTIAL.turn_index(2) == 2


def test_a_copy_steps_with_its_own_device_alone() -> None:
    own = [pb.StepTotal(labels=5, members=[1]), pb.StepTotal(), pb.StepTotal(labels=2, members=[1])]
    assert turns(COPIES, own) == [Turn(0, (1,), 5), Turn(2, (1,), 2)]


@pytest.mark.parametrize(
    ("mode", "lanes", "sources", "shared", "site_steps", "divisor", "patience_s"),
    [
        (JOINT, [["a", "b"]], ["site"], True, 1, 8, 2 * 3.0),
        (SEQUENTIAL, [["a", "b"]], ["site"], True, 2, 5, 50.0),
        (COPIES, [["a"], ["b"]], ["a", "b"], False, 1, 5, 50.0),
    ],
)
def test_what_follows_from_a_mode(
    mode: HostMode, lanes: list[list[str]], sources: list[str], shared: bool, site_steps: int, divisor: int,
    patience_s: float,
) -> None:  # fmt: skip
    assert mode.lanes(["a", "b"]) == lanes
    assert mode.sources("site", ["a", "b"]) == sources
    assert (mode.is_shared("site"), mode.is_shared("ends")) == (shared, False)
    assert (mode.steps_of_source("site", 2), mode.steps_of_source("ends", 2)) == (site_steps, 1)
    assert mode.divisor(union_labels=8, own_labels=5) == divisor
    assert mode.patience_s(pb.Deadlines(step_s=3.0, round_s=50.0)) == patience_s


@pytest.mark.parametrize("key", ["host_mode", "labels"])
def test_the_run_file_and_the_objects_know_the_same_words(key: str) -> None:
    table: Mapping[str, Any] = {"host_mode": HOST_MODES, "labels": LABEL_PLACES}[key]
    for word, known in table.items():
        split = parse_run_file("", source="test", overrides=[f"split.{key}={word}"]).split
        assert getattr(split, key) == known.word == word
    with pytest.raises(ConfigError) as refused:
        parse_run_file("", source="test", overrides=[f"split.{key}=whatever"])
    assert all(repr(word) in str(refused.value) for word in table)


def test_an_unknown_word_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        Refused, match=r"split\.host_mode = 'turns' is not known here; known: joint, sequential, copies"
    ):
        host_mode("turns")
    with pytest.raises(Refused, match=r"split\.labels = '' is not known here; known: device, last-stage"):
        label_place("")


# ---------------------------------------------------------------- one home


def comparisons(tree: ast.AST) -> Iterator[int]:
    """Yields the lines that tell a word of split.host_mode or split.labels from another."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            texts = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            named = {part.attr for part in parts if isinstance(part, ast.Attribute)} | texts
            if texts & WORDS or "host_mode" in named or (texts and named & KEYS):
                yield node.lineno
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in WORDS:
            yield node.value.lineno


@pytest.mark.parametrize(
    "code",
    [
        "plan.host_mode == 'joint'", "'copies' != mode", "split.labels == 'device'", "x in ('joint', 'copies')",
        "plan.host_mode not in MODES", "setting(run, 'split', 'labels') == word",
        "match x:\n  case 'last-stage': pass",
    ],
)  # fmt: skip
def test_the_check_sees_a_comparison(code: str) -> None:
    assert list(comparisons(ast.parse(code)))


@pytest.mark.parametrize("code", ["row.role == 'device'", "total.labels == turn.labels", "host_mode(plan.host_mode)"])
def test_the_check_passes_what_compares_no_word(code: str) -> None:
    assert not list(comparisons(ast.parse(code)))


def test_no_module_but_one_tells_the_words_apart() -> None:
    files = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert HOME in files
    found = {
        f"{name}:{line}"
        for name, path in files.items()
        if name != HOME
        for line in comparisons(ast.parse(path.read_text()))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("mode", "devices", "in_flight", "threads", "workers"),
    [(JOINT, 3, 2, 2, 2), (JOINT, 1, 2, 2, 1), (JOINT, 1, 4, 2, 2), (SEQUENTIAL, 3, 2, 2, 1), (JOINT, 8, 2, 6, 6), (JOINT, 3, 2, 4, 2)],
)  # fmt: skip
def test_workers_divide_a_hosts_threads_if_each_has_two_micro_batches(
    mode: HostMode, devices: int, in_flight: int, threads: int, workers: int
) -> None:
    assert mode.workers(devices, in_flight, threads) == workers
