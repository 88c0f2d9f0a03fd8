"""The attack of benchmarks.leakage reads what is there to be read, and nothing else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.leakage import LEAST_TOKENS, Seen, look, read_back
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.whole import load_whole

WORDS, WIDTH, TOKENS = 50, 8, 400


def seen(states_ND: torch.Tensor, ids_N: torch.Tensor) -> Seen:
    return Seen({1: states_ND}, ids_N)


def test_a_rotation_of_the_embeddings_is_read_back_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings_VD = torch.randn(WORDS, WIDTH, generator=generator)
    turn_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    public_N, private_N = (torch.randint(WORDS, (TOKENS,), generator=generator) for _ in range(2))
    turned = [seen(embeddings_VD[ids_N] @ turn_DD, ids_N) for ids_N in (public_N, private_N)]
    leak = read_back(turned[0], turned[1], 1, embeddings_VD)
    assert (leak.first, leak.among) == (1.0, 1.0)
    assert leak.nearest < 0.5, "the map is needed"
    assert torch.equal(leak.first_ids_N, private_N)
    noise = [seen(torch.randn(TOKENS, WIDTH, generator=generator), ids_N) for ids_N in (public_N, private_N)]
    assert read_back(noise[0], noise[1], 1, embeddings_VD).first < 0.1


def test_the_states_at_cut_0_are_the_embeddings(tiny: ModelSource) -> None:
    model = load_whole(tiny, "fp32")
    texts = [list(range(4, 12)), [7] * (LEAST_TOKENS - 1)]
    found = look(model, texts, (0, 2))
    assert found.ids_N.tolist() == texts[0], "the short text is left out"
    torch.testing.assert_close(found.states_ND[0], model.get_input_embeddings().weight[texts[0]].detach())
    assert found.states_ND[2].shape == found.states_ND[0].shape
    assert read_back(found, found, 0, model.get_input_embeddings().weight.detach()).nearest == pytest.approx(1.0)
