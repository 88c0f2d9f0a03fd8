"""`edgelam chat` over the hosts of a live federation, through Flower and gRPC, against the same adapter on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from edgelam_fl.federation.remote import route_speaker
from edgelam_fl.serving.generate import LocalSpeaker, Speaker, greedy
from edgelam_fl.serving.results import open_result
from tests.integration.federation import Federation, Run
from tests.support import WAIT_S

pytestmark = pytest.mark.processes

EDGELAM = str(Path(sys.executable).with_name("edgelam"))
PROMPT = "What does bin do?"
NEW = 12


def chat(run: Run, *more: str) -> subprocess.CompletedProcess[str]:
    command = [EDGELAM, "chat", str(run.path), "--prompt", PROMPT, "--max-tokens", "16", *more]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=WAIT_S, check=False)


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


def test_the_command_answers_over_the_route(averaged: Run, federation: Federation) -> None:
    over_route = chat(averaged, "--server", federation.server, "--operator", str(federation.operator.folder))
    assert over_route.returncode == 0, f"{over_route.stderr}\n{federation.logs()}"
    assert over_route.stdout.endswith("\n")


def test_a_server_that_does_not_answer_is_said(averaged: Run) -> None:
    done = chat(averaged, "--server", "127.0.0.1:9")
    assert done.returncode == 3
    assert "no server answers at 127.0.0.1:9" in done.stderr


def test_the_model_as_it_came_is_only_here(averaged: Run) -> None:
    done = chat(averaged, "--server", "127.0.0.1:9", "--base")
    assert done.returncode == 2
    assert "--base and --server do not go together" in done.stderr
