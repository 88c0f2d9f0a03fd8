"""What a malicious device of a simulation sends instead of its update. The product's nodes have nothing of this."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from edgelam_fl.model.adapter import Adapter

_NOISE = 10.0


def sign_flip(start: Adapter, trained: Adapter, _: str) -> Adapter:
    """The update turned round."""
    return {name: 2 * start[name] - array for name, array in trained.items()}


def noise(start: Adapter, trained: Adapter, seed: str) -> Adapter:
    """Gaussian noise of ten times the update's own size (root mean square of each tensor), on top of it."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little"))
    sent = {}
    for name, array in sorted(trained.items()):
        size = float(np.sqrt(np.mean(np.square(array - start[name], dtype=np.float64))))
        sent[name] = array + (_NOISE * size * rng.standard_normal(array.shape)).astype(np.float32)
    return sent


ATTACKS: dict[str, Callable[[Adapter, Adapter, str], Adapter]] = {"sign-flip": sign_flip, "noise": noise}
