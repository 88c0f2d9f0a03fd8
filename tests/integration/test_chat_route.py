"""`edgelam chat` over the hosts of a live federation, through Flower and gRPC, against the same adapter on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from edgelam_fl.federation.remote import route_speaker
from edgelam_fl.serving.generate import LocalSpeaker, Speaker, answer, greedy
from edgelam_fl.serving.results import open_result
from tests.integration.conftest import Done, Edgelam
from tests.integration.federation import Federation, Run

pytestmark = pytest.mark.processes

PROMPT = "What does bin do?"
NEW, LONGEST = 12, 16


def chat(edgelam: Edgelam, run: Run, *more: str) -> Done:
    return edgelam("chat", str(run.path), "--prompt", PROMPT, "--max-tokens", str(LONGEST), *more)


def test_the_command_answers_over_the_route_with_the_tokens_at_home(
    edgelam: Edgelam, averaged: Run, federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the command asks over its route, the test does: greedy, twelve tokens, whatever they say, since this model may well
    answer with nothing.
    """
    result = open_result(averaged.path)
    local = LocalSpeaker(result.config.model, result.config.task)
    local.put_on(result.adapter)
    got = list[int]()

    @contextmanager
    def heard(*arguments: Any) -> Iterator[Speaker]:
        with route_speaker(*arguments) as over_route:
            got.extend(tokens(over_route))
            yield over_route

    monkeypatch.setattr("edgelam_fl.federation.remote.route_speaker", heard)
    assert federation.data_plane is not None
    connections, threads = len(federation.data_plane.connections), set(threading.enumerate())
    over_route = chat(edgelam, averaged, "--server", federation.server, "--operator", str(federation.operator.folder))
    assert over_route.returncode == 0, f"{over_route.stderr}\n{federation.logs()}"
    assert over_route.stdout.endswith("\n")
    assert over_route.stdout.strip() == answer(result.config, result.adapter, PROMPT, LONGEST).strip()
    assert got == tokens(local)
    assert len(got) == NEW
    assert len(federation.data_plane.connections) >= connections + 2, "entry and exit to the edge server"
    assert not [thread for thread in {*threading.enumerate()} - threads if not thread.daemon], (
        "its process would not end"
    )


def tokens(speaker: Speaker) -> list[int]:
    with torch.no_grad(), speaker.opened(tuned=True) as step:
        return list(greedy(step, [5, 77, 130, 9, 254, 31], NEW, stop_ids=()))


def test_a_server_that_does_not_answer_is_said(edgelam: Edgelam, averaged: Run) -> None:
    done = chat(edgelam, averaged, "--server", "127.0.0.1:9")
    assert done.returncode == 3
    assert "no server answers at 127.0.0.1:9" in done.stderr


def test_the_model_as_it_came_is_only_here(edgelam: Edgelam, averaged: Run) -> None:
    done = chat(edgelam, averaged, "--server", "127.0.0.1:9", "--base")
    assert done.returncode == 2
    assert "--base and --server do not go together" in done.stderr
