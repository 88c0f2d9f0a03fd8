"""Attacks on hidden states read what is there to be read, and nothing else."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.leakage import states
from benchmarks.leakage.looking import look, stages_to
from benchmarks.leakage.texts import LEAST_TOKENS, MODULES, OTHER_MODULES
from edgelam_fl.model.source import ModelSource
from edgelam_fl.privacy.attacks import inverter, nearest, ridge
from edgelam_fl.privacy.attacks.seen import Seen, chance, interval, reading, share_read

WORDS, WIDTH, TEXTS, LENGTH = 50, 8, 40, 10


def texts_of(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(WORDS, (TEXTS, LENGTH), generator=generator)


def as_seen(states_RTD: torch.Tensor, ids_RT: torch.Tensor) -> Seen:
    return Seen(states_RTD.flatten(0, 1), ids_RT.flatten(), (LENGTH,) * TEXTS)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture
def embeddings_VD(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(WORDS, WIDTH, generator=generator)


def test_a_rotation_of_the_embeddings_is_read_back_and_noise_is_not(
    generator: torch.Generator, embeddings_VD: torch.Tensor
) -> None:
    turn_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    public_RT, private_RT = texts_of(generator), texts_of(generator)
    public, private = (as_seen(embeddings_VD[ids] @ turn_DD, ids) for ids in (public_RT, private_RT))
    read = ridge.read(public, private, embeddings_VD)
    assert (share_read(read, private), read.among_five) == (1.0, 1.0)
    assert share_read(nearest.read(private, embeddings_VD), private) < 0.5, "the map is needed"
    noise_ND = torch.randn(private.states_ND.shape, generator=generator)
    noise = [part.seen_as(noise_ND) for part in (public, private)]
    assert share_read(ridge.read(noise[0], noise[1], embeddings_VD), private) < 0.1


def test_the_inverter_reads_what_hides_among_neighbours(
    generator: torch.Generator, embeddings_VD: torch.Tensor
) -> None:
    """Each state is masked by the next token, so that one position alone does not say its token."""

    def mixed(ids_RT: torch.Tensor) -> Seen:
        own_RTD = embeddings_VD[ids_RT]
        return as_seen(own_RTD + 2 * own_RTD.roll(-1, dims=1), ids_RT)

    public, private = mixed(texts_of(generator)), mixed(texts_of(generator))
    training = inverter.Training(width=48, epochs=30, texts=8, negatives=64, rate=1e-2, kept_back=0.1)
    linear = share_read(ridge.read(public, private, embeddings_VD), private)
    read = share_read(inverter.read(public, private, embeddings_VD, seed=1, training=training), private)
    assert read > linear + 0.1 > 5 * chance(public, private)


def test_an_inverter_that_learns_nothing_is_the_ridge_map(
    generator: torch.Generator, embeddings_VD: torch.Tensor
) -> None:
    seen = as_seen(embeddings_VD[ids_RT := texts_of(generator)], ids_RT)
    untrained = inverter.train(seen, embeddings_VD, 1, inverter.Training(epochs=1, rate=1e-12))
    learned = seen.texts(torch.randperm(TEXTS, generator=torch.Generator().manual_seed(1)).tolist()[2:])
    torch.testing.assert_close(
        untrained.vectors(seen), ridge.fit(learned, embeddings_VD).vectors(seen.states_ND), rtol=1e-4, atol=1e-4
    )


def test_the_states_at_cut_0_are_the_embeddings(tiny: ModelSource) -> None:
    stages = stages_to(tiny, "fp32", (0, 2))
    texts = [list(range(4, 12)), [7] * (LEAST_TOKENS - 1), [9] * LEAST_TOKENS]
    found = look(stages, texts, (0, 2))
    assert found[0].ids_N.tolist() == texts[0] + texts[2], "the short text is left out"
    assert found[0].lengths_R == (8, LEAST_TOKENS)
    model: Any = stages[0].model
    embeddings_VD = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(found[0].states_ND[:8], embeddings_VD[texts[0]])
    assert found[2].states_ND.shape == found[0].states_ND.shape
    assert share_read(nearest.read(found[0], embeddings_VD), found[0]) == 1.0


def test_chance_and_interval_are_those_of_the_texts() -> None:
    states_ND = torch.zeros(8, 2)
    public = Seen(states_ND, torch.tensor([3, 3, 3, 1, 2, 3, 1, 1]), (4, 4))
    private = Seen(states_ND, torch.tensor([3, 1, 2, 2, 2, 2, 2, 3]), (4, 4))
    assert chance(public, private) == 0.25
    hits_N = torch.tensor([1.0] * 4 + [0.0] * 4)
    assert interval(hits_N, (4, 4)) == (0.0, 1.0), "two texts that differ say little"
    assert interval(torch.ones(8), (4, 4)) == (1.0, 1.0)
    assert reading(torch.tensor([[3, 0, 0, 0, 0, 1]] * 8), private).among_five == 0.25, "the sixth guess does not count"
    assert private.texts([1, 0]).ids_N.tolist() == [2, 2, 2, 3, 3, 1, 2, 2]


def test_the_attackers_modules_are_not_the_private_ones() -> None:
    assert not {name.partition(".")[0] for name in OTHER_MODULES} & set(MODULES)


def test_results_say_which_attack_read_how_much() -> None:
    def row(cut: int, attack: str, read: float) -> states.Row:
        return states.Row("smollm2-135m", cut, attack, read, (read - 0.1, read + 0.1), 50)

    rows = [row(cut, attack, 0.9 - 0.1 * cut) for cut in (0, 2) for attack in (states.NEAREST, states.FIRST)]
    found = states.Outcome(
        [*rows, row(2, states.REPLAY, 0.6)], {"public": 9, "docstrings": 8, "private": 7}, 0.02, ("a", "b", "c")
    )
    figures = {figure.name: figure for figure in states.figures_of("smollm2-135m", found)}
    assert figures["cut 2: ridge map, first guess"].value == 70.0
    assert figures["cut 0: nearest neighbour in the embedding table"].holds is False
    assert figures["always the commonest public token"].value == 2.0
    assert figures["cuts at which the best attack reads less than the ridge map"].holds, "the map itself is an attack"
    assert "minilm-l6, cut 2: ridge map, first guess" in {f.name for f in states.figures_of("minilm-l6", found)}
    table = states.table({"smollm2-135m": found})
    assert "| 2 | 70.0 (60.0 to 80.0) | 70.0 (60.0 to 80.0) | 60.0 (50.0 to 70.0) |" in table
    lines = ElementTree.fromstring(states.picture({"smollm2-135m": found})).findall("{*}polyline")
    assert len(lines) == 3
