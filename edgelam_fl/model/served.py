"""Keeps the tensors of a model whose files are elsewhere: they arrive one by one, are verified and stay on disk. Knows no network.

A `Stream` gives the bytes of named parts. Each part becomes a file, which is named `.part` until its SHA-256 is right. A broken
stream or the end of this process costs only the bytes under way: the next stream continues at the byte that is missing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelam_fl.errors import EnvironmentProblem, PeerLost, ProtocolError
from edgelam_fl.files import write_atomically
from edgelam_fl.machine import disk_free_bytes
from edgelam_fl.model.identity import MORE_TEMPLATES

SAFETENSORS_DTYPES = {  # safetensors' name -> torch's, bytes of an element
    "F32": ("float32", 4), "BF16": ("bfloat16", 2), "F16": ("float16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "I32": ("int32", 4), "I64": ("int64", 8), "BOOL": ("bool", 1),
}  # fmt: skip
_PATIENCE_S = 180.0  # without a byte; a server that has the model in another format converts it first
_RETRY_S = 1.0
_TRIES = 3  # for a part that arrives with wrong bytes
_ROOM_BYTES = 16 << 20  # left free on the disk


@dataclass(frozen=True)
class AnnouncedPart:
    """A tensor, or a small file (without dtype), as the server announced it."""

    name: str
    size: int
    sha256: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


# Takes (part, bytes of it on disk) for each part; yields the missing bytes in order, each piece from one part only.
Stream = Callable[[Sequence[tuple[AnnouncedPart, int]]], Iterator[bytes]]


def check_part(part: AnnouncedPart, most_bytes: int) -> None:
    """Raises ProtocolError for a part that must not be announced, before any of its bytes are requested."""
    if not re.fullmatch(rf"({MORE_TEMPLATES}/)?\w[\w.-]{{0,250}}", part.name) or not re.fullmatch(
        "[0-9a-f]{64}", part.sha256
    ):
        raise ProtocolError(
            f"the hub announced a part with the name {part.name[:80]!r} and the hash {part.sha256[:80]!r}"
        )
    if part.dtype and part.dtype not in SAFETENSORS_DTYPES:
        raise ProtocolError(
            f"the hub announced {part.name} in {part.dtype[:20]!r}; known: {', '.join(SAFETENSORS_DTYPES)}"
        )
    exact = not part.dtype or part.size == math.prod(part.shape) * SAFETENSORS_DTYPES[part.dtype][1]
    if part.size > most_bytes or not exact:
        raise ProtocolError(
            f"the hub announced {part.size} bytes for {part.name} of shape {list(part.shape)[:8]} in {part.dtype or 'a file'}; "
            f"it may have {most_bytes} at most"
        )


def map_tensor(folder: Path, part: AnnouncedPart) -> Any:
    """Maps a tensor from its file: memory is used when it is touched, and shared with other processes."""
    import torch

    array = np.memmap(folder / part.name, np.uint8, "c")
    return torch.from_numpy(array).view(getattr(torch, SAFETENSORS_DTYPES[part.dtype][0])).view(part.shape)


def read_manifest(folder: Path, model: str) -> dict[str, AnnouncedPart]:
    """Returns what the hub announced for a model, by its digest: several may share a folder of tensors."""
    try:
        entries = json.loads(_manifest(folder, model).read_text(encoding="utf-8"))
        return {name: AnnouncedPart(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # absent, or cut off by a power failure: it is requested again


def write_manifest(folder: Path, model: str, parts: dict[str, AnnouncedPart]) -> None:
    write_atomically(_manifest(folder, model), json.dumps({name: asdict(part) for name, part in parts.items()}))


def _manifest(folder: Path, model: str) -> Path:
    return folder / f"manifest-{model[:16]}.json"


def fetch_missing(
    folder: Path,
    wanted: Sequence[AnnouncedPart],
    stream: Stream,
    *,
    free: Callable[[Path], int] = disk_free_bytes,
    patience_s: float = _PATIENCE_S,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Fetches the `wanted` parts that `folder` lacks or holds with other bytes; returns the number of bytes received.

    `progress` is called with the bytes of the missing parts so far and in all. Raises EnvironmentProblem if the disk is too
    small, the stream gives nothing for `patience_s`, or a part stays wrong.
    """
    missing = [part for part in wanted if not _is_right(folder / part.name, part)]
    for part in missing:
        (folder / part.name).unlink(missing_ok=True)  # processes that have it mapped keep it
    total, came, heard = sum(part.size for part in missing), 0, time.monotonic()
    _check_room(folder, sum(part.size - _begun(folder, part) for part in missing), free)
    wrong: dict[str, int] = {}
    while missing:
        begun = total - sum(part.size - _begun(folder, part) for part in missing)
        problem = "it ended early"
        try:
            for size in _receive(folder, missing, stream, wrong):
                came, begun, heard = came + size, begun + size, time.monotonic()
                progress(begun, total)
        except PeerLost as error:
            problem = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _full(folder, sum(part.size - _begun(folder, part) for part in missing), free) from error
        missing = [part for part in missing if not (folder / part.name).exists()]
        if missing and time.monotonic() - heard > patience_s:
            late = (
                f"{len(missing)} of {len(wanted)} tensors of the slice did not come from the server's hub for {patience_s:.0f} s: "
                f"{problem}. The bytes that arrived are kept, and the next attempt continues from there"
            )
            raise EnvironmentProblem(late, late)
        if missing:
            time.sleep(min(_RETRY_S, patience_s / 10))
    return came


def _receive(folder: Path, parts: Sequence[AnnouncedPart], stream: Stream, wrong: dict[str, int]) -> Iterator[int]:
    """Writes the pieces of one stream to the files of the parts; yields the size of each piece."""
    pieces = stream([(part, _begun(folder, part)) for part in parts])
    for part in parts:
        begun, path = _begun(folder, part), _partial(folder, part)
        with path.open("ab", buffering=0) as file:
            while begun < part.size:
                piece = next(pieces, None)
                if piece is None:
                    return
                if begun + len(piece) > part.size:
                    raise ProtocolError(f"the hub sent more than the {part.size} bytes of {part.name}")
                _write_all(file, piece)
                begun += len(piece)
                yield len(piece)
        _finish(folder, part, wrong)


def _write_all(file: object, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]  # type: ignore[attr-defined]


def _finish(folder: Path, part: AnnouncedPart, wrong: dict[str, int]) -> None:
    """Puts a part in place if its bytes are the announced ones; else deletes it, so that it is fetched again."""
    path = _partial(folder, part)
    if _is_right(path, part):
        path.replace(folder / part.name)
        return
    path.unlink()
    wrong[part.name] = wrong.get(part.name, 0) + 1
    if wrong[part.name] >= _TRIES:
        raise EnvironmentProblem(
            f"{part.name} came from the server's hub {_TRIES} times with other bytes than announced; check the network and "
            f"the disk under {folder}",
            f"{part.name} came from the server's hub {_TRIES} times with other bytes than announced",
        )


def _is_right(path: Path, part: AnnouncedPart) -> bool:
    if not path.is_file() or path.stat().st_size != part.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == part.sha256


def _partial(folder: Path, part: AnnouncedPart) -> Path:
    return folder / f"{part.name}.{part.sha256[:8]}.part"


def _begun(folder: Path, part: AnnouncedPart) -> int:
    path = _partial(folder, part)
    size = path.stat().st_size if path.exists() else 0
    if size > part.size:
        path.unlink()
        return 0
    return size


def _check_room(folder: Path, needed: int, free: Callable[[Path], int]) -> None:
    if needed and free(folder) < needed + _ROOM_BYTES:
        raise _full(folder, needed, free)


def _full(folder: Path, needed: int, free: Callable[[Path], int]) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the slice needs {needed / 1e6:.0f} MB more under {folder} (and {_ROOM_BYTES / 1e6:.0f} MB in reserve), "
        f"{free(folder) / 1e6:.0f} MB are free there; free some space, or set EDGELAM_CACHE to a folder on a larger disk",
        f"the slice needs {needed / 1e6:.0f} MB more on its disk, {free(folder) / 1e6:.0f} MB are free there",
    )
