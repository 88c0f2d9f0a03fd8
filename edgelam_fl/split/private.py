"""Differential privacy where the training happens: in the sum of a host's step, and in the update that leaves a device.

The unit is one device with all its data: what it adds is clipped to a bound, as one vector, and the noise belongs to that
bound. Knows tensors, and bounds and deviations from the plan; knows no epsilon (`privacy.accounting` does), nor who is counted.

A host whose layers several devices share releases one sum per step, and steps with nothing else. On a chain, each host has a part
of the bound, so that one device's gradient over all hosts keeps the whole one, and a step is one release, not one per host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from edgelam_fl.model.adapter import Adapter
from edgelam_fl.privacy.mechanism import clip_to, gaussian
from edgelam_fl.split.judging import norm_of
from edgelam_fl.wire import edgelam_pb2 as pb


class PrivateSum:
    """The sums of one lane's steps, each gradient in them clipped, with noise, over a constant."""

    def __init__(self, privacy: pb.Privacy, noise: np.random.Generator) -> None:
        """`privacy`: of the host's plan, with a `step_clip`. `noise`: what the noise is drawn from."""
        self.measured, self.clipped = 0, 0  # gradients of devices over all steps, and those that were too long
        self._privacy, self._noise = privacy, noise

    def of(
        self, gradients: Sequence[Sequence[torch.Tensor | None]], parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Returns a step's gradient for each parameter. A device that is missing counts as a gradient of zeros.

        `gradients`: of each counted device, in device order; each is one vector over all `parameters`. Every parameter gets
        noise, also one that no counted device's route crosses: that would say who was counted.
        """
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for gradient in gradients:
            scale = self._scale(norm_of(gradient))
            for summed, part in zip(total, gradient, strict=False):  # a device without a batch has no gradient at all
                if part is not None:
                    summed.add_(part, alpha=scale)
        return [self._noised(summed) for summed in total]

    def _noised(self, summed: torch.Tensor) -> torch.Tensor:
        """Adds the noise, in the CPU's memory: it is drawn in float64, which not every chip has."""
        drawn = gaussian(tuple(summed.shape), self._privacy.step_noise, self._noise)
        here = summed.cpu().add_(torch.from_numpy(np.asarray(drawn))).div_(self._privacy.step_devices)
        return here.to(summed.device)

    def _scale(self, norm: float) -> float:
        """Returns the factor that brings a gradient of this norm to the bound, and counts it."""
        self.measured += 1
        if norm <= self._privacy.step_clip:
            return 1.0
        self.clipped += 1
        return self._privacy.step_clip / norm


def private_update(
    start: Mapping[str, np.ndarray], trained: Adapter, privacy: pb.Privacy, noise: np.random.Generator
) -> tuple[Adapter, bool]:
    """Returns what a device sends instead of what it trained, and whether its update was longer than the bound.

    The update, trained minus start, is one vector over all tensors; it is clipped, then noise is added to each number. An
    update that is not finite counts as zeros: the others must not see that either.
    """
    update: dict[str, np.ndarray] = {name: array.astype(np.float64) - start[name] for name, array in trained.items()}
    if not all(np.isfinite(array).all() for array in update.values()):
        update = {name: np.zeros(array.shape) for name, array in trained.items()}
    clipped, norm = clip_to(update, privacy.update_clip)
    sent = {
        name: (start[name] + array + gaussian(array.shape, privacy.update_noise, noise)).astype(np.float32)
        for name, array in clipped.items()
    }
    return sent, norm > privacy.update_clip
