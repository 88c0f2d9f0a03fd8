"""What the owner of a node sees of it, on a terminal and in a journal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from edgelam_fl.federation.node_line import node_line
from edgelam_fl.telemetry.events import NodeProgress
from edgelam_fl.telemetry.progress import write_node_progress
from edgelam_fl.telemetry.waiting import SignTiming


def fetching(part: int) -> NodeProgress:
    return NodeProgress(doing="fetching", bytes=part * 1_000_000, of_bytes=40_000_000, steps=6)


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (fetching(10), "ann: round 3: fetching layers, 25 % of 40.0 MB"),
        (NodeProgress(doing="training", step=2, steps=6, loss=2.5), "ann: round 3: step 2 of 6, loss 2.500"),
        (NodeProgress(doing="reporting", step=6, steps=6), "ann: its part of round 3 is over"),
        (None, "ann: waits for a run"),
    ],
)
def test_on_a_terminal_a_line_says_what_the_node_does(
    tmp_path: Path, progress: NodeProgress | None, words: str
) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with node_line(console, "ann", tmp_path) as look:
        if progress is not None:
            write_node_progress(tmp_path, "run/3/1/ann", progress)
        look()
    assert words in console.file.getvalue()  # type: ignore[attr-defined]


def test_in_a_journal_only_layers_that_come_are_said(tmp_path: Path) -> None:
    now_s, console = [0.0], Console(file=io.StringIO(), width=20)
    with node_line(console, "ann", tmp_path, SignTiming(now=lambda: now_s[0])) as look:
        for second in range(30):
            now_s[0] = float(second)
            write_node_progress(
                tmp_path, "run/1/1/ann", fetching(second) if second < 20 else NodeProgress(doing="training", steps=6)
            )
            look()
    lines = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    words = "round 1: fetching layers, {} % of 40.0 MB"
    assert lines == f"{words.format(10)} {words.format(35)} all layers have come"
