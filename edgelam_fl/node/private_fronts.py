"""The adapters of fronts that never leave this device (privacy.private_front), one per run, kept over restarts.

Knows files and tensors; knows nothing about training. `node.held` trains what it finds here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import numpy as np

from edgelam_fl.files import say, write_private
from edgelam_fl.model.adapter import Adapter, from_bytes, to_bytes
from edgelam_fl.model.lora import A, B
from edgelam_fl.privacy.mechanism import secret_generator

FOLDER = "private-fronts"  # below a node's state


class PrivateFronts:
    """The private fronts of one device."""

    def __init__(self, state: Path | None = None) -> None:
        """`state`: the node's folder; None keeps the fronts in memory alone."""
        self._folder = None if state is None else state / FOLDER
        self._newest: tuple[str, Adapter] = "", {}

    def of(self, run: str, like: Mapping[str, np.ndarray]) -> Adapter:
        """Returns a run's front with the names and shapes of `like`: as it was kept, and new where nothing fits.

        A new A is drawn from the machine's entropy, never from the run's seed, which hosts know; a new B is zero. What begins as
        the base has it is that of `like`.
        """
        kept = self._kept(run)
        fits = {name for name, array in like.items() if name in kept and kept[name].shape == array.shape}
        return {name: kept[name] if name in fits else _new(name, array) for name, array in like.items()}

    def keep(self, run: str, front: Adapter) -> None:
        """Keeps what a round trained. A disk that does not take it costs no round: the front then stays in memory alone."""
        self._newest = run, front
        if self._folder is None:
            return
        try:
            write_private(self._file(self._folder, run), to_bytes(front))
        except OSError as error:
            say(
                f"the private front could not be written ({error}): what this round trained of it is lost if this process ends before "
                f"a later round is written",
                sys.stderr,
            )

    def _kept(self, run: str) -> Adapter:
        if self._newest[0] == run:
            return self._newest[1]
        if self._folder is None or not self._file(self._folder, run).exists():
            return {}
        return from_bytes(self._file(self._folder, run).read_bytes())

    @staticmethod
    def _file(folder: Path, run: str) -> Path:
        return folder / f"{quote(run, safe='')}.safetensors"


def _new(name: str, like: np.ndarray) -> np.ndarray:
    if name.endswith(B):
        return np.zeros(like.shape, np.float32)
    if not name.endswith(A):
        return like
    bound = like.shape[1] ** -0.5
    return secret_generator().uniform(-bound, bound, like.shape).astype(np.float32)
