"""The hub's service for models: sends a node the tensors that it needs, in the form in which it will hold them.

A run's ServerApp offers its model, and gives the run's nodes a token for it; without the token of a run that goes on there is
not even a description.

The bytes are ranges of the files that a node on this machine would map (`model.weights` makes them, one tensor in memory at
a time), so a node receives bit for bit what it would have made of the whole model. Models are
named by digest; no path that a client names is ever opened.

The hashes guard against broken transfers and disks, not against the hub: the server's owner chooses the model, and could
send other weights under the plan's digest. Nodes trust the server for that, as they trust its plans.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from edgelam_fl.errors import EdgelamError, ModelError
from edgelam_fl.files import write_private
from edgelam_fl.hub import OFFERS
from edgelam_fl.hub.places import Place, PlaceLimits, Places
from edgelam_fl.model.identity import CONFIG, is_text_file, text_files
from edgelam_fl.model.index import layer_number, safetensors_header
from edgelam_fl.model.source import ModelSource, find_model, why_changed
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.services import service_handler
from edgelam_fl.wire.relay import token_of

SLICES_SERVICE = "Slices"
_TOKEN_BYTES = 32
CHUNK_BYTES = 1 << 20  # most bytes per message of Fetch
_OWN_CHUNK_BYTES = 256 << 10  # of this hub's messages: over a slow link, too, one leaves before patience ends
_LOG = logging.getLogger(__name__)
# A node asks for one thing after the other; more calls are for connections that broke and were dialled again.
LIMITS = PlaceLimits(most=32, most_per_member=4, still_s=30.0)


def make_service(
    state: Path, chunk_bytes: int = _OWN_CHUNK_BYTES, limits: PlaceLimits = LIMITS
) -> grpc.GenericRpcHandler:
    """Returns the service of the models that are offered in the hub's state folder."""
    slices = Slices(state, chunk_bytes, limits)
    return service_handler(SLICES_SERVICE, {"Describe": slices.describe, "List": slices.list, "Fetch": slices.fetch})


@contextmanager
def offered(source: ModelSource, state: Path) -> Iterator[bytes]:
    """Lets every hub with this state folder serve the model until the block ends; yields the token to ask with."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    note = _note(state, source.digest, token)
    write_private(note, json.dumps({"place": str(source.gguf or source.folder)}))
    try:
        yield token
    finally:
        note.unlink(missing_ok=True)


def _note(state: Path, digest: str, token: bytes) -> Path:
    return state / OFFERS / digest / f"{hashlib.sha256(token).hexdigest()}.json"


@dataclass(frozen=True)
class Blob:
    """A range of bytes in a file, with the element type and shape of the tensor that it holds, if it is one."""

    path: Path
    offset: int
    size: int
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Slices:
    """The service's three methods, and what it knows about the offered models' files."""

    def __init__(self, state: Path, chunk_bytes: int, limits: PlaceLimits) -> None:
        self._state, self._chunk_bytes = state, chunk_bytes
        self._sources: dict[str, ModelSource] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._hashes: dict[Blob, str] = {}
        self._converting = threading.Lock()  # one tensor in memory, however many ask
        self._places = Places(limits)

    # ---------------------------------------------------------------- the three methods

    def describe(self, request: pb.SliceRequest, context: grpc.ServicerContext) -> pb.SliceModel:
        """Returns the model's small files and the names and shapes of all its tensors."""
        with self._served(request, context) as (source, _):
            files = [
                pb.SliceFile(name=name, size_bytes=blob.size, sha256=self._hash(blob))
                for name, blob in ((name, self._file(source, name)) for name in (CONFIG, *text_files(source.folder)))
                if blob is not None
            ]
            tensors = [pb.SliceEntry(name=name, shape=_shape(source, name)) for name in source.index]
            return pb.SliceModel(
                model_digest=source.digest, files=files, tensors=tensors, identity=source.files,
                weights_digest=source.weights_digest,
            )  # fmt: skip
        raise AssertionError("the block returns or raises")

    def list(self, request: pb.SliceRequest, context: grpc.ServicerContext) -> Iterator[pb.SliceTensor]:
        """Describes the named tensors as Fetch sends them; the scales of a tensor that has any follow it."""
        with self._served(request, context) as (source, place):
            for part in request.parts:
                for name in (part.name, f"{part.name}_scale"):
                    blob = self._tensor(source, name, request.base, request.compute)
                    if blob is not None:
                        tensor = pb.SliceTensor(
                            name=name, dtype=blob.dtype, shape=blob.shape, size_bytes=blob.size, sha256=self._hash(blob)
                        )
                        with place.waiting():
                            yield tensor

    def fetch(self, request: pb.SliceRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Sends the named parts' bytes, each from its offset on."""
        with self._served(request, context) as (source, place):
            for part in request.parts:
                for chunk in _chunks(self._blob(source, part, request), part.offset, self._chunk_bytes):
                    with place.waiting():
                        yield chunk

    @contextmanager
    def _served(self, request: pb.SliceRequest, context: grpc.ServicerContext) -> Iterator[tuple[ModelSource, Place]]:
        """Yields the model that a call asks for, and the call's place. Aborts the call if it may not have both."""
        with self._places.place(context) as place:
            try:
                yield self._source(request.model_digest, token_of(context.invocation_metadata())), place
            except EdgelamError as error:
                _LOG.warning("refused a slice to %s: %s", place.member or context.peer(), error)
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    # ---------------------------------------------------------------- places of the bytes

    def _source(self, digest: str, token: bytes) -> ModelSource:
        note = _note(self._state, digest, token)
        if not re.fullmatch("[0-9a-f]{64}", digest) or not note.is_file():
            raise ModelError(
                f"no run of this server lets this node fetch a model with the digest {digest[:12]!r} (any more)"
            )
        if digest not in self._sources:
            source = find_model(json.loads(note.read_text(encoding="utf-8"))["place"])
            if source.digest != digest:
                raise ModelError(f"the files of model {digest[:12]} have changed on the server: start the run again")
            self._sources[digest] = source
        elif changes := why_changed(self._sources[digest]):
            del self._sources[digest]
            self._headers.clear()
            self._hashes.clear()
            raise ModelError(
                f"the files of model {digest[:12]} have changed on the server ({changes}): start the run again"
            )
        return self._sources[digest]

    def _blob(self, source: ModelSource, part: pb.SlicePart, request: pb.SliceRequest) -> Blob:
        if part.file:
            known = part.name == CONFIG or is_text_file(part.name)
            blob = self._file(source, part.name) if known else None
        else:
            blob = self._tensor(source, part.name, request.base, request.compute)
        if blob is None or part.offset > blob.size:
            raise ModelError(f"the model has no byte {part.offset} of {part.name[:80]!r}")
        return blob

    def _file(self, source: ModelSource, name: str) -> Blob | None:
        path = source.folder / name
        return Blob(path, 0, path.stat().st_size) if path.is_file() else None

    def _tensor(self, source: ModelSource, name: str, base: str, compute: str) -> Blob | None:
        """Returns None for the scales of a tensor without any. Raises ModelError for an unknown name or base."""
        from edgelam_fl.model.weights import tensor_file  # PyTorch, once the first node asks

        matrix = name if name in source.index else name.removesuffix("_scale")
        with self._converting:
            path, stored = tensor_file(source, matrix, base, compute)
        begin, header = self._header(path)
        entry = header.get(stored if name == matrix else f"{stored}_scale")
        if entry is None:
            return None
        first, end = entry["data_offsets"]
        return Blob(path, begin + first, end - first, entry["dtype"], tuple(entry["shape"]))

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Returns where a safetensors file's data begin, and the header that says what they are."""
        if path not in self._headers:
            with path.open("rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
            self._headers[path] = begin, safetensors_header(path)
        return self._headers[path]

    def _hash(self, blob: Blob) -> str:
        if blob not in self._hashes:
            digest = hashlib.sha256()
            for chunk in _chunks(blob, 0, CHUNK_BYTES):
                digest.update(chunk)
            self._hashes[blob] = digest.hexdigest()
        return self._hashes[blob]


def _shape(source: ModelSource, name: str) -> Sequence[int]:
    """Returns the tensor's shape in the model. A GGUF file's index has GPT-2's matrices transposed."""
    shape = source.index[name].shape
    turned = source.gguf is not None and source.family.input_first and layer_number(name) is not None
    return shape[::-1] if turned and len(shape) == 2 else shape


def _chunks(blob: Blob, offset: int, chunk_bytes: int) -> Iterator[bytes]:
    with blob.path.open("rb") as file:
        file.seek(blob.offset + offset)
        left = blob.size - offset
        while left:
            chunk = file.read(min(chunk_bytes, left))
            if not chunk:
                raise ModelError(f"{blob.path} has become shorter on the server")
            left -= len(chunk)
            yield chunk
