"""Limits the length of what a device sends at its cut, and adds noise to it: hidden states, and gradients of them.

Noise without a limit protects little: a token with a long state would stand out of it. Knows tensors; knows nothing about
layers, links or texts. Shapes: B rows, T tokens, D hidden, K real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgelam_fl.privacy.mechanism import secret_generator


class Blur:
    """A limit of each token's length, and Gaussian noise relative to the limit."""

    def __init__(self, limit: float, clip: float, noise: float, generator: np.random.Generator | None = None) -> None:
        """`limit`: the longest state of a token. `clip`: the longest gradient of a token, as a multiple of the
        median of its micro-batch. `noise`: how long the noise on a token is on average, as a part of its limit. `generator`:
        None takes one that follows from nothing but the machine's entropy.
        """
        self._limit, self._clip, self._noise = limit, clip, noise
        self._generator = secret_generator() if generator is None else generator

    def states(self, states_BTD: torch.Tensor, row_lengths: Sequence[int], *, begins: bool = True) -> torch.Tensor:
        """Returns the hidden states as they may leave the device; gradients flow through the limit.

        `begins`: whether texts begin with these tokens. The first token of a text gets noise and no limit: its state is an
        anchor for the attention of all layers that follow, up to a hundred times longer than the others, and a model does not
        survive its loss.
        """
        first = 1 if begins else 0
        later_BTD = _limited(states_BTD[:, first:], self._limit)
        return self._noised(torch.cat([states_BTD[:, :first], later_BTD], dim=1), self._limit, row_lengths)

    def gradient(self, grad_BTD: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor:
        """Returns the gradient of a micro-batch as it may leave the device.

        Its limit follows from the micro-batch itself, since gradients shrink as training goes on. So it hides which tokens
        have labels and blurs which, and bounds nothing in the sense of differential privacy.
        """
        lengths = grad_BTD.detach().float().norm(dim=-1)[_real(grad_BTD, row_lengths)]
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return grad_BTD
        limit = self._clip * float(lengths.median())
        return self._noised(_limited(grad_BTD, limit), limit, row_lengths)

    def _noised(self, values_BTD: torch.Tensor, limit: float, row_lengths: Sequence[int]) -> torch.Tensor:
        if not self._noise:
            return values_BTD
        drawn = self._generator.standard_normal(tuple(values_BTD.shape), dtype=np.float32)
        deviation = (
            self._noise * limit / values_BTD.shape[-1] ** 0.5
        )  # a vector of D such values is as long as promised
        noise_BTD = torch.from_numpy(drawn).mul_(deviation) * _real(values_BTD, row_lengths)[..., None]
        return values_BTD + noise_BTD.to(values_BTD.dtype)


def _limited(values: torch.Tensor, limit: float) -> torch.Tensor:
    lengths = values.float().norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return values * (limit / lengths).clamp(max=1.0).to(values.dtype)


def _real(values_BTD: torch.Tensor, row_lengths: Sequence[int]) -> torch.Tensor:
    """Returns which positions [B, T] hold real tokens; padding is on the right."""
    return torch.arange(values_BTD.shape[1]) < torch.tensor(list(row_lengths))[:, None]
