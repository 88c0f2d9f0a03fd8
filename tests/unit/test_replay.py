"""Attacks that run the public front read a text from its states; without the right front they do no harm to a guess."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.leakage.looking import front_to, look, stages_to
from edgelam_fl.model.source import ModelSource
from edgelam_fl.privacy.attacks import refine, replay
from edgelam_fl.privacy.attacks.front import Front
from edgelam_fl.privacy.attacks.refine import Descent
from edgelam_fl.privacy.attacks.replay import Candidates, Search
from edgelam_fl.privacy.attacks.seen import Seen, share_read

CUT, WORDS = 2, 258
OPENINGS = torch.arange(WORDS)


SEARCH = Search(widths=(8, WORDS))


@pytest.fixture(scope="module")
def private(tiny: ModelSource) -> Seen:
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, WORDS, (6 + n % 5,), generator=generator).tolist() for n in range(8)]
    return look(stages_to(tiny, "fp32", (CUT,)), texts, (CUT,))[CUT]


@pytest.fixture(scope="module")
def embeddings_VD(tiny: ModelSource) -> torch.Tensor:
    (stage,) = stages_to(tiny, "fp32", (0,))
    model: Any = stage.model
    return model.get_input_embeddings().weight.detach()


def in_any_order(private: Seen) -> Candidates:
    """Ranks all tokens alike, in an order that says nothing."""
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(WORDS, generator=generator) for _ in private.ids_N]
    return Candidates(torch.stack(orders), torch.zeros(len(orders), WORDS))


def test_the_public_front_gives_every_token_away(tiny: ModelSource, private: Seen) -> None:
    ranked, front = in_any_order(private), front_to(tiny, "fp32", CUT)
    assert share_read(ranked.reading(private), private) < 0.1
    read = replay.read(private, ranked, front, OPENINGS, SEARCH)
    assert (share_read(read, private), read.among_five) == (1.0, 1.0)
    narrow = replay.read(private, ranked, front, OPENINGS, Search(widths=(8,)))
    assert share_read(narrow, private) < 0.5, "only what is tried is found"


def test_rounding_on_the_wire_does_not_help(tiny: ModelSource, private: Seen) -> None:
    def rounding(states: torch.Tensor) -> torch.Tensor:
        return states.bfloat16().float()

    rounded, front = private.seen_as(rounding(private.states_ND)), front_to(tiny, "fp32", CUT)
    for attacker in (front, Front(front.model, front.new_cache, shown=rounding)):
        read = replay.read(rounded, in_any_order(private), attacker, OPENINGS, SEARCH)
        assert share_read(read, private) == 1.0


def test_where_no_state_matches_the_likeliest_near_token_is_read(tiny: ModelSource, private: Seen) -> None:
    """A front that the attacker does not have: states alone mislead, so what the candidates say must count."""
    strange = private.seen_as(torch.randn(private.states_ND.shape, generator=torch.Generator().manual_seed(1)))
    others_NK = torch.randint(4, WORDS, (len(private.ids_N), 7), generator=torch.Generator().manual_seed(2))
    ranked = Candidates(
        torch.cat([private.ids_N[:, None], others_NK], dim=1), torch.tensor([[0.0] + [-40.0] * 7] * len(private.ids_N))
    )
    read = replay.read(strange, ranked, front_to(tiny, "fp32", CUT), OPENINGS, SEARCH)
    first = len(private.lengths_R)
    assert (read.ids_N == private.ids_N).sum() >= len(private.ids_N) - first


def test_gradients_improve_a_guess(tiny: ModelSource, private: Seen, embeddings_VD: torch.Tensor) -> None:
    ids_NK = torch.cat(
        [private.ids_N[:, None].roll(1, dims=0), private.ids_N[:, None], private.ids_N[:, None].roll(2, dims=0)], dim=1
    )
    wrong = Candidates(
        ids_NK.repeat(1, 2), torch.tensor([[-0.5, -1.0, -2.0, -9.0, -9.0, -9.0]]).expand(len(ids_NK), -1)
    )
    read = refine.read(private, wrong, front_to(tiny, "fp32", CUT), embeddings_VD, Descent(steps=25, rate=0.5))
    assert share_read(wrong.reading(private), private) < 0.1
    assert share_read(read, private) > 0.9
