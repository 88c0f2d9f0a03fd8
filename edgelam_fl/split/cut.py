"""The defence of one device's cut: what happens to hidden states and gradients before they leave, and what the front learns
beside its task.

Joins `privacy.defences`, which knows tensors alone, with the device's front. Knows no links. Shapes: B rows, T tokens, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgelam_fl.model.chip import off
from edgelam_fl.model.stage import Stage
from edgelam_fl.privacy.defences.blur import Blur
from edgelam_fl.privacy.defences.reader import Reader
from edgelam_fl.tasks.base import Unit
from edgelam_fl.wire import edgelam_pb2 as pb

_ROWS, _TOKENS = 4, 64  # of the micro-batch that tells the typical length


class CutDefence:
    """The defence that a plan asks for; without one, everything passes as it is."""

    def __init__(self, cut: pb.Cut, front: Stage, generator: np.random.Generator | None = None) -> None:
        """`generator`: of all that is drawn; None takes one that follows from nothing but the machine's entropy."""
        self._generator = generator
        self._front, self._disguise, self._blur = front, cut.disguise, None
        if cut.clip:
            self._blur = Blur(cut.clip * typical_length(front), cut.clip, cut.noise, generator)
        # The size of a matrix by the hidden width: made when it is first needed. It learns in the CPU's memory, from what leaves.
        self._reader: Reader | None = None
        self._embeddings_VD = torch.empty(0)

    def states(self, states_BTD: torch.Tensor, row_lengths: Sequence[int], *, begins: bool = True) -> torch.Tensor:
        """Returns hidden states as they may leave the device. `begins`: whether texts begin with these tokens."""
        return states_BTD if self._blur is None else self._blur.states(states_BTD, row_lengths, begins=begins)

    def gradient(self, grad_BTD: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor:
        """Returns the gradient of the last host's hidden states as it may leave the device."""
        return grad_BTD if self._blur is None else self._blur.gradient(grad_BTD, row_lengths)

    def disguising(self, unit: Unit, sent_BTD: torch.Tensor, grad_BTD: torch.Tensor, divisor: int) -> torch.Tensor:
        """Returns the gradient of a micro-batch's hidden states with what disguises the text added; the reader learns.

        `sent_BTD`: the states that left the device. `divisor`: as of `Ends.train`. A device's steps divide by all of its own
        labels in the end, so a micro-batch counts by its share of them, as its loss does.
        """
        if not self._disguise:
            return grad_BTD
        if self._reader is None:
            self._embeddings_VD = off(self._front.embeddings())
            self._reader = Reader(sent_BTD.shape[2], self._generator)
        real_BT = torch.arange(sent_BTD.shape[1]) < torch.tensor(unit.row_lengths)[:, None]
        states_BTD = sent_BTD.detach().float().requires_grad_(True)
        embeddings_VD = self._embeddings_VD
        ids_N = unit.inputs[real_BT]
        known = self._reader.information(states_BTD[real_BT], ids_N, embeddings_VD)
        (away_BTD,) = torch.autograd.grad(known * (self._disguise * unit.count / divisor), states_BTD)
        self._reader.learn(states_BTD[real_BT], ids_N, embeddings_VD)
        return grad_BTD + away_BTD.to(grad_BTD.dtype)


@torch.no_grad()
def typical_length(front: Stage) -> float:
    """Returns the median length of a token's hidden state after the untrained front: the same on every device.

    Of tokens drawn without anybody's text, low numbers more often than high ones, as words are frequent; a row's first token
    does not count. The front computes without what it has learned, so that training cannot move the limit.
    """
    vocabulary = len(front.embeddings())
    drawn = np.random.default_rng(0).random((_ROWS, _TOKENS))
    ids_BT = torch.from_numpy((vocabulary**drawn).astype(np.int64) - 1).clamp(0, vocabulary - 1)
    trained = front.adapter_parameters
    front.use(front.untrained_set())
    try:
        states_BTD = off(front(ids_BT, [_TOKENS] * _ROWS))
    finally:
        front.use(trained)
    return float(states_BTD[:, 1:].float().norm(dim=-1).median())
