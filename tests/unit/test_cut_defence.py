"""What happens to hidden states and gradients before they leave a device: limit, noise, and a front that learns to say less."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from edgelam_fl.model.lora import LoraKind
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import LoraSettings, Span, Stage, load_stages
from edgelam_fl.privacy.defences.blur import Blur
from edgelam_fl.privacy.defences.reader import Reader
from edgelam_fl.split.cut import CutDefence, typical_length
from edgelam_fl.tasks.base import Example
from edgelam_fl.tasks.causal_lm import make_units
from edgelam_fl.wire import edgelam_pb2 as pb

ROWS, TOKENS, WIDTH = 4, 50, 96
LIMIT = 3.0
ALL = [TOKENS] * ROWS


def states(seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def lengths(values_BTD: torch.Tensor) -> torch.Tensor:
    return values_BTD.norm(dim=-1)


# ---------------------------------------------------------------- limit


def test_no_token_after_the_first_is_longer_than_the_limit() -> None:
    given = states() * torch.linspace(0.01, 1.0, TOKENS)[:, None]  # of lengths from 0.1 to 10
    sent = Blur(LIMIT, 1.0, 0.0).states(given, ALL)
    assert float(lengths(sent[:, 1:]).max()) <= LIMIT * 1.00001
    assert torch.equal(sent[:, 0], given[:, 0])
    short = lengths(given) < LIMIT
    assert short.any()
    assert torch.equal(sent[short], given[short])
    longer = lengths(given) > LIMIT
    cosines = torch.cosine_similarity(sent[longer], given[longer])
    assert torch.allclose(cosines, torch.ones_like(cosines)), "a limit changes no direction"


def test_where_a_text_goes_on_its_first_token_has_a_limit_too() -> None:
    sent = Blur(LIMIT, 1.0, 0.0).states(states(), ALL, begins=False)
    assert float(lengths(sent).max()) <= LIMIT * 1.00001


def test_gradients_pass_the_limit_as_its_derivative_says() -> None:
    given = states()[:1, :2, :6].double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: Blur(1.0, 1.0, 0.0).states(x, [2]), (given,), eps=1e-4, atol=1e-3)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_noise_is_as_large_as_promised(noise: float) -> None:
    """Within 2 % of the deviation over 10,000 draws of a token: a deviation that is wrong by 5 % fails."""
    given = torch.zeros(1, 10_000, WIDTH)
    drawn = Blur(LIMIT, 1.0, noise, np.random.default_rng(1)).states(given, [10_000])
    deviation = noise * LIMIT / WIDTH**0.5
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(drawn.mean())) < 0.01 * deviation
    assert float(lengths(drawn).mean()) == pytest.approx(noise * LIMIT, rel=0.02)
    of_values_D = drawn[0].std(dim=0)
    assert float((of_values_D / deviation - 1).abs().max()) < 0.05, "in every direction alike"


def test_padding_gets_no_noise_and_every_real_token_does() -> None:
    drawn = Blur(LIMIT, 1.0, 0.5, np.random.default_rng(1)).states(torch.zeros(2, 10, WIDTH), [10, 4])
    assert torch.equal(lengths(drawn) > 0, torch.arange(10) < torch.tensor([[10], [4]]))


def test_noise_follows_from_no_seed() -> None:
    made = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        made.append(Blur(LIMIT, 1.0, 0.5).states(torch.zeros(1, 4, WIDTH), [4]))
    assert not torch.equal(*made)
    assert not torch.equal(*(Blur(LIMIT, 1.0, 0.5).states(torch.zeros(1, 2, WIDTH), [2])[0]))


def test_a_gradient_has_the_limit_of_its_own_micro_batch() -> None:
    given = states(scale=1e-6)
    given[:, 10:20] *= 100.0
    given[:, 20:30] = 0.0  # tokens without a label
    median = float(lengths(given)[lengths(given) > 0].median())
    sent = Blur(LIMIT, 2.0, 0.0).gradient(given, ALL)
    assert float(lengths(sent).max()) <= 2 * median * 1.00001
    noisy = Blur(LIMIT, 2.0, 0.3, np.random.default_rng(1)).gradient(given, ALL)
    assert float((noisy - sent).std()) == pytest.approx(0.3 * 2 * median / WIDTH**0.5, rel=0.02)
    assert float(lengths(noisy)[:, 20:30].min()) > 0, "nobody sees which tokens have labels"
    nothing = torch.zeros(1, 3, WIDTH)
    assert torch.equal(Blur(LIMIT, 2.0, 0.3).gradient(nothing, [3]), nothing)


# ---------------------------------------------------------------- a reader of one's own


def test_a_reader_learns_what_states_say() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings_VD = torch.randn(500, 32, generator=generator)
    ids_N = torch.randint(500, (2000,), generator=generator)
    turned_DD = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    telling_ND, silent_ND = embeddings_VD[ids_N] @ turned_DD, torch.randn(2000, 32, generator=generator)
    for given_ND, least, most in ((telling_ND, 5.0, 7.0), (silent_ND, 0.0, 0.7)):
        reader = Reader(32, np.random.default_rng(0))
        reader.learn(given_ND[:1500], ids_N[:1500], embeddings_VD)
        assert least <= float(reader.information(given_ND[1500:], ids_N[1500:], embeddings_VD)) <= most


def test_following_the_gradient_tells_the_reader_less() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings_VD = torch.randn(100, 16, generator=generator)
    ids_N = torch.randint(100, (300,), generator=generator)
    states_ND = embeddings_VD[ids_N]
    reader, known = Reader(16, np.random.default_rng(0)), []
    reader.learn(states_ND, ids_N, embeddings_VD)
    for _ in range(20):
        states_ND = states_ND.detach().requires_grad_(True)
        said = reader.information(states_ND, ids_N, embeddings_VD)
        known.append(float(said.detach()))
        (grad_ND,) = torch.autograd.grad(said, states_ND)
        states_ND = states_ND - torch.nn.functional.normalize(grad_ND, dim=1)
    assert known[-1] < known[0] / 2


# ---------------------------------------------------------------- with a front


@pytest.fixture
def front(tiny: ModelSource) -> Stage:
    return load_stages(tiny, [Span(0, 2, embed=True)], "fp32", LoraSettings(4, 8.0, ("q_proj", "down_proj")))[0]


def test_without_a_defence_nothing_is_touched(front: Stage) -> None:
    defence, given, grad = CutDefence(pb.Cut(), front), torch.randn(1, 3, 64), torch.randn(1, 3, 64)
    (unit,) = make_units([Example([5, 6, 7], [5, 6, 7], 2)], 1)
    assert defence.states(given, [3]) is given
    assert defence.gradient(grad, [3]) is grad
    assert defence.disguising(unit, given, grad, 2) is grad


def test_training_does_not_move_the_limit(front: Stage) -> None:
    before, trained = typical_length(front), front.adapter_parameters
    for name, parameter in trained.items():
        if name.endswith("lora_B.weight"):
            parameter.data.fill_(0.5)
    assert typical_length(front) == before > 0
    assert front.adapter_parameters is trained
    ids_BT = torch.arange(40).reshape(2, 20)
    sent = CutDefence(pb.Cut(clip=0.5), front).states(front(ids_BT, [20, 20]).detach(), [20, 20])
    assert float(lengths(sent[:, 1:]).max()) <= 0.5 * before * 1.00001


def test_the_limit_is_that_of_the_base_with_every_kind_of_lora(tiny: ModelSource, front: Stage) -> None:
    kind = LoraKind(dora=True, saved=("norm",))
    (other,) = load_stages(
        tiny, [Span(0, 2, embed=True)], "fp32", LoraSettings(4, 8.0, ("q_proj", "down_proj"), kind=kind)
    )
    for parameter in other.adapter_parameters.values():
        parameter.data.mul_(1.5)
    assert typical_length(other) == pytest.approx(typical_length(front), rel=1e-5)


def test_a_disguise_adds_to_the_gradient_by_its_weight(front: Stage) -> None:
    (unit,) = make_units([Example(list(range(40, 60)), list(range(40, 60)), 19)], 1)
    sent = front(unit.inputs, unit.row_lengths)
    nothing = torch.zeros_like(sent)
    one, two = (
        CutDefence(pb.Cut(disguise=weight), front, np.random.default_rng(0)).disguising(unit, sent, nothing, 19)
        for weight in (1.0, 2.0)
    )
    assert float(one.abs().max()) > 0
    assert float(two.norm() / one.norm()) == pytest.approx(2.0)
