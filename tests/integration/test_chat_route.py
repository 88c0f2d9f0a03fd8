"""`edgelam chat` over the hosts of a live federation, through Flower and gRPC, against the same adapter on this machine."""

from __future__ import annotations

import threading

import pytest
import torch
from rich.console import Console

from edgelam_fl.federation.remote import route_speaker
from edgelam_fl.serving.generate import LocalSpeaker, Speaker, greedy
from edgelam_fl.serving.results import open_result
from tests.integration.conftest import Done, Edgelam
from tests.integration.federation import Federation, Run

pytestmark = pytest.mark.processes

PROMPT = "What does bin do?"
NEW = 12


def chat(edgelam: Edgelam, run: Run, *more: str) -> Done:
    return edgelam("chat", str(run.path), "--prompt", PROMPT, "--max-tokens", "16", *more)


def test_the_tokens_over_the_route_are_those_at_home(averaged: Run, federation: Federation) -> None:
    """Greedy, twelve tokens, whatever they say: this model may well answer with nothing."""
    result = open_result(averaged.path)
    local = LocalSpeaker(result.config.model, result.config.task)
    local.put_on(result.adapter)
    assert federation.data_plane is not None
    before = len(federation.data_plane.connections)
    with route_speaker(result, federation.operator, Console(quiet=True)) as over_route:
        got = tokens(over_route)
    assert got == tokens(local)
    assert len(got) == NEW
    assert len(federation.data_plane.connections) >= before + 2, "entry and exit to the edge server"


def tokens(speaker: Speaker) -> list[int]:
    with torch.no_grad(), speaker.opened(tuned=True) as step:
        return list(greedy(step, [5, 77, 130, 9, 254, 31], NEW, stop_ids=()))


def test_the_command_answers_over_the_route(edgelam: Edgelam, averaged: Run, federation: Federation) -> None:
    before = set(threading.enumerate())
    over_route = chat(edgelam, averaged, "--server", federation.server, "--operator", str(federation.operator.folder))
    assert over_route.returncode == 0, f"{over_route.stderr}\n{federation.logs()}"
    assert over_route.stdout.endswith("\n")
    assert not [thread for thread in {*threading.enumerate()} - before if not thread.daemon], (
        "its process would not end"
    )


def test_a_server_that_does_not_answer_is_said(edgelam: Edgelam, averaged: Run) -> None:
    done = chat(edgelam, averaged, "--server", "127.0.0.1:9")
    assert done.returncode == 3
    assert "no server answers at 127.0.0.1:9" in done.stderr


def test_the_model_as_it_came_is_only_here(edgelam: Edgelam, averaged: Run) -> None:
    done = chat(edgelam, averaged, "--server", "127.0.0.1:9", "--base")
    assert done.returncode == 2
    assert "--base and --server do not go together" in done.stderr
