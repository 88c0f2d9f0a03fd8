"""Channels in files: what was drawn once is kept in float16, and a user's own file is checked axis by axis.

A file is .safetensors or .npz with `up`, `down` and `speed_kmh`. Half precision adds an error of about -70 dB to a channel.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from edgelam_fl.array_files import Array, checked_arrays, fault_of, read_arrays
from edgelam_fl.errors import DataError
from edgelam_fl.files import write_atomically
from edgelam_fl.wireless.channels.links import SLOTS, Links, unit_power

AXES = f"[links, {SLOTS} slots, subcarriers, antenna ports]"
_BAND = ("links", "slots", "subcarriers", "antenna ports")
_ARRAYS = (Array("up", _BAND), Array("down", _BAND), Array("speed_kmh", _BAND[:1], is_complex=False))
_FORMAT = 1  # changes whenever the same scene comes to be drawn or kept in another way


class Scene(Protocol):
    """A scene that links are drawn from, with all that they depend on in its repr: `Paths` or `UrbanMacro`."""

    def draw(self) -> Links: ...


def kept(scene: Scene, folder: Path) -> Links:
    """Returns a scene's links from its file in `folder`; draws them and writes the file if there is none."""
    name = hashlib.sha256(f"{_FORMAT} {scene!r}".encode()).hexdigest()[:16]
    file = folder / f"channels-{name}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(_halves(scene.draw())))
    return read_links(file)


def _halves(links: Links) -> dict[str, npt.NDArray[np.generic]]:
    """Returns the arrays of a file: real and imaginary part as the last axis, in float16."""
    bands = {"up": links.up_NTFM, "down": links.down_NTFM}
    halves = {name: np.stack([band.real, band.imag], -1).astype(np.float16, order="C") for name, band in bands.items()}
    return {**halves, "speed_kmh": links.speed_kmh}


def read_links(file: Path) -> Links:
    """Reads links from a file, each scaled to power 1 over both bands.

    `up` and `down` are complex, or real with real and imaginary part as a last axis of 2. Raises DataError, which names the
    axes that are meant, or the first link that cannot be used.
    """
    found = checked_arrays(file, read_arrays(file), _ARRAYS)
    if (slots := found["up"].shape[1]) != SLOTS:
        raise DataError(f"{file} has {slots} slots, and channels have {SLOTS}: 'up' and 'down' are {AXES}", "axes")
    for link in range(len(found["up"])):
        if words := fault_of({key: array[link] for key, array in found.items()}):
            raise DataError(f"{file}, link {link}: {words}", "numbers", f"link {link}")
    both = unit_power(np.concatenate([found["up"], found["down"]], axis=2))
    subcarriers = found["up"].shape[2]
    return Links(both[:, :, :subcarriers], both[:, :, subcarriers:], found["speed_kmh"])
