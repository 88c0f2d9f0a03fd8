"""Reads hidden states by a small recurrent network over the whole text, trained on public text.

The network adds to the ridge map what it learns from neighbours in both directions, so it starts as the ridge map; training
keeps the epoch that reads most of a part of the public text that it does not train on. Tokens are told apart through the
embedding table, so tokens that the public text lacks can be read, too.

Shapes: N tokens, B texts of a batch, T longest text, D hidden, H recurrent width, S tokens of a sampled softmax, P public
tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from edgelam_fl.privacy.attacks import ridge
from edgelam_fl.privacy.attacks.seen import GUESSES, Reading, Seen, best_tokens, reading, scaled, share

_FIRST_SCALE = 16.0  # of cosines before the softmax; learned from there


@dataclass(frozen=True)
class Training:
    """Settings of the network's training. `negatives`: other tokens that each batch's tokens must win against."""

    width: int = 192
    epochs: int = 6
    texts: int = 16
    negatives: int = 1024
    rate: float = 2e-3
    kept_back: float = 0.05


USUAL = Training()


class Inverter(nn.Module):
    """A two-way recurrent network beside a ridge map, with the public states' mean and spread."""

    def __init__(self, public: Seen, start: ridge.RidgeMap, width: int) -> None:
        super().__init__()
        size = public.states_ND.shape[1]
        states_ND = scaled(public.states_ND)
        self._start = start
        self._mean_D, self._spread_D = states_ND.mean(0), states_ND.std(0) + 1e-6
        self._recurrent = nn.GRU(size, width, batch_first=True, bidirectional=True)
        self._out = nn.Linear(2 * width, size)
        nn.init.zeros_(self._out.weight)
        nn.init.zeros_(self._out.bias)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_SCALE).log())

    @property
    def directions_VD(self) -> torch.Tensor:
        return self._start.directions_VD

    def forward(self, texts: list[torch.Tensor]) -> torch.Tensor:
        """Returns for each state of the texts, one after another, a vector [N, D] near its token's direction."""
        inputs = [((scaled(states_TD) - self._mean_D) / self._spread_D) for states_TD in texts]
        lengths = torch.tensor([len(part) for part in inputs])
        packed = pack_padded_sequence(
            pad_sequence(inputs, batch_first=True), lengths, batch_first=True, enforce_sorted=False
        )
        hidden_BTH = pad_packed_sequence(self._recurrent(packed)[0], batch_first=True)[0]
        real_BT = torch.arange(hidden_BTH.shape[1]) < lengths[:, None]
        correction_ND: torch.Tensor = self._out(hidden_BTH[real_BT])
        return self._start.vectors(torch.cat(texts)) + correction_ND

    @torch.no_grad()
    def vectors(self, seen: Seen, texts: int = 64) -> torch.Tensor:
        """Returns the vectors [N, D] of all states, some texts at a time."""
        parts = list(seen.states_of_texts)
        return torch.cat([self(parts[n : n + texts]) for n in range(0, len(parts), texts)])


def train(public: Seen, embeddings_VD: torch.Tensor, seed: int, training: Training = USUAL) -> Inverter:
    """Trains an inverter on the public text. The seed decides its first weights and the order of texts."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(public.lengths_R), generator=generator).tolist()
    kept = max(1, round(training.kept_back * len(order)))
    judged, learned = public.texts(order[:kept]), public.texts(order[kept:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inverter = Inverter(learned, ridge.fit(learned, embeddings_VD), training.width)
    optimizer = torch.optim.Adam(inverter.parameters(), training.rate)
    steps = training.epochs * -(-len(learned.lengths_R) // training.texts)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, total_steps=steps)
    best, kept_state = _share_of(inverter, judged), _copy(inverter)
    for _ in range(training.epochs):
        _epoch(inverter, learned, optimizer, falling, training, generator)
        if (reached := _share_of(inverter, judged)) > best:
            best, kept_state = reached, _copy(inverter)
    inverter.load_state_dict(kept_state)
    return inverter


def read(
    public: Seen, private: Seen, embeddings_VD: torch.Tensor, seed: int = 0, training: Training = USUAL
) -> Reading:
    """Guesses the private text's tokens by an inverter that is trained on the public text."""
    inverter = train(public, embeddings_VD, seed, training)
    return reading(best_tokens(inverter.vectors(private), inverter.directions_VD, GUESSES), private)


def _epoch(
    inverter: Inverter, public: Seen, optimizer: torch.optim.Optimizer, falling: torch.optim.lr_scheduler.LRScheduler,
    training: Training, generator: torch.Generator,
) -> None:  # fmt: skip
    states, ids = public.states_of_texts, public.ids_N.split(list(public.lengths_R))
    order = torch.randperm(len(states), generator=generator)
    for batch in order.split(training.texts):
        numbers = batch.tolist()
        own_N = torch.cat([ids[n] for n in numbers])
        among_S, target_N = _sampled(own_N, public.ids_N, len(inverter.directions_VD), training, generator)
        vectors_ND = normalize(inverter([states[n] for n in numbers]), dim=1)
        scores_NS = inverter.log_scale.exp() * vectors_ND @ inverter.directions_VD[among_S].T
        optimizer.zero_grad()
        cross_entropy(scores_NS, target_N).backward()
        optimizer.step()
        falling.step()


def _sampled(
    ids_N: torch.Tensor, common_P: torch.Tensor, words: int, training: Training, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens that a batch's softmax is over, and each of the batch's tokens as a place among them.

    Half of the negatives are tokens as common as in the public text, half are any tokens.
    """
    half = training.negatives // 2
    common = common_P[torch.randint(len(common_P), (half,), generator=generator)]
    any_token = torch.randint(words, (half,), generator=generator)
    among_S = torch.cat([ids_N, common, any_token]).unique()
    return among_S, torch.searchsorted(among_S, ids_N)


def _share_of(inverter: Inverter, judged: Seen) -> float:
    return share(best_tokens(inverter.vectors(judged), inverter.directions_VD, 1)[:, 0] == judged.ids_N)


def _copy(inverter: Inverter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in inverter.state_dict().items()}
