"""Falsifies updates, as a malicious device of a simulation does. Nodes outside a simulation cannot do this."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from edgelam_fl.model.adapter import Adapter

_NOISE = 10.0  # size of the noise, in sizes of the update


def sign_flip(start: Adapter, trained: Adapter, _: str) -> Adapter:
    """Returns the start minus the update, instead of plus."""
    return {name: 2 * start[name] - array for name, array in trained.items()}


def noise(start: Adapter, trained: Adapter, seed: str) -> Adapter:
    """Adds Gaussian noise of ten times the update's size, which is the root mean square per tensor."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    sent = {}
    for name, array in sorted(trained.items()):
        size = float(np.sqrt(np.mean(np.square(array - start[name], dtype=np.float64))))
        sent[name] = array + (_NOISE * size * rng.standard_normal(array.shape)).astype(np.float32)
    return sent


# what the device started from, what it trained, a seed -> what it sends
ATTACKS: dict[str, Callable[[Adapter, Adapter, str], Adapter]] = {"sign-flip": sign_flip, "noise": noise}
