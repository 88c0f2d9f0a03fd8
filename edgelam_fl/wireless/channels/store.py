"""Channels in files: what was drawn once is kept in float16, and a user's own file is checked axis by axis.

A file is .safetensors or .npz with `up`, `down` and `speed_kmh`. Half precision adds an error of about -70 dB to a channel.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from edgelam_fl.errors import DataError
from edgelam_fl.files import write_atomically
from edgelam_fl.wireless.channels.links import SLOTS, Links, unit_power

AXES = f"[links, {SLOTS} slots, subcarriers, antenna ports]"
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
    axes that are meant.
    """
    arrays = _arrays(file)
    missing = [name for name in ("up", "down", "speed_kmh") if name not in arrays]
    if missing:
        raise DataError(
            f"{file} has no array {missing[0]!r}: channels need `up` and `down`, {AXES}, and `speed_kmh`, [links]",
            "missing-field",
        )
    up, down = (_complex(file, name, arrays[name]) for name in ("up", "down"))
    speed_kmh = arrays["speed_kmh"]
    if up.shape != down.shape or speed_kmh.shape != up.shape[:1]:
        raise DataError(
            f"{file}: up {list(up.shape)}, down {list(down.shape)} and speed_kmh {list(speed_kmh.shape)} do not belong "
            f"together: up and down have the same shape, {AXES}, and speed_kmh has one number per link",
            "format",
        )
    both = unit_power(np.concatenate([up, down], axis=2))
    return Links(both[:, :, : up.shape[2]], both[:, :, up.shape[2] :], speed_kmh.astype(np.float32))


def _arrays(file: Path) -> dict[str, npt.NDArray[np.generic]]:
    if not file.exists():
        raise DataError(f"{file} does not exist", "missing-file")
    try:
        if file.suffix == ".npz":
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as opened:
                return dict(opened)
        if file.suffix == ".safetensors":
            return load_file(file)
    except (OSError, TypeError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise DataError(f"{file} cannot be read as channels: {error}", "unreadable") from error
    raise DataError(f"{file}: channels are read from .npz and .safetensors", "format")


def _complex(file: Path, name: str, array: npt.NDArray[np.generic]) -> npt.NDArray[np.complex64]:
    """Returns a band as complex numbers. Raises DataError for other axes, for no link, for power 0 and for what is not finite."""
    shape = list(array.shape)
    if array.ndim == 5 and shape[-1] == 2 and np.isrealobj(array):
        parts = array.astype(np.float32)
        array = parts[..., 0] + 1j * parts[..., 1]
    if array.ndim != 4 or not np.iscomplexobj(array) or array.shape[1] != SLOTS or not array.size:
        raise DataError(
            f"{file}: {name!r} is {array.dtype} {shape}. Its axes are {AXES}, complex; or real, with real and imaginary part "
            "as a fifth axis of 2",
            "format",
        )
    power = np.abs(array).sum(axis=(1, 2, 3))
    wrong = np.flatnonzero(~(np.isfinite(power) & (power > 0)))
    if wrong.size:
        raise DataError(
            f"{file}: link {wrong[0]} of {name!r} has no power or values that are not finite ({wrong.size} such links)",
            "format", f"link {wrong[0]}",
        )  # fmt: skip
    return array.astype(np.complex64)
