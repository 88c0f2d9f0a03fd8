"""A node's end of the hub's slices: fetches a model's config and index first, and each tensor when it is first needed.

Never asks for what is on this machine already, so a node that has its slice needs no hub. The nodes of a machine share the
folder. Knows models and the hub; knows no plans.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from filelock import FileLock

from edgelam_fl.errors import EnvironmentProblem, ModelError, PeerLost, ProtocolError, Refused
from edgelam_fl.files import cache_folder, write_atomically
from edgelam_fl.hub.slices import CHUNK_BYTES, SLICES_SERVICE
from edgelam_fl.model.identity import (
    CONFIG,
    MORE_TEMPLATES,
    ModelIdentity,
    digest_of,
    is_text_file,
    listed_files,
)
from edgelam_fl.model.index import TensorEntry
from edgelam_fl.model.served import AnnouncedPart, check_part, fetch_missing, map_tensor, read_manifest, write_manifest
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.telemetry.events import Emit, SliceComing, SliceReceived
from edgelam_fl.trust.identity import SERVER
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.options import grpc_reason
from edgelam_fl.wire.grpc.secure import PLAIN, Security
from edgelam_fl.wire.grpc.services import stub
from edgelam_fl.wire.relay import token_metadata

_MOST_FILE_BYTES = 64 << 20
_MOST_INDEX_BYTES = 32 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _MOST_INDEX_BYTES),
    # Bytes on their way are lost with the connection and sent again. gRPC would let them grow to megabytes; this much is
    # enough for 80 Mbit/s at 50 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 512 << 10),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FetchTiming:
    """Waits and pauses of a node that asks the hub."""

    call_s: float = 120.0  # for one call; a longer transfer is continued by the next call
    answer_s: float = 30.0  # for the description of a model
    tries: int = 4
    retry_s: float = 2.0  # between two tries
    progress_every_s: float = 2.0  # between two events while tensors come


DEFAULT_FETCH_TIMING = FetchTiming()


def open_model(
    name: str,
    digest: str,
    hub: str,
    *,
    tokenizer: bool = False,
    download: bool = True,
    emit: Emit = lambda event: None,
    token: bytes = b"",
    timing: FetchTiming = DEFAULT_FETCH_TIMING,
    security: Security = PLAIN,
) -> ModelSource:
    """Returns the model of a plan: this machine's own if it has the model, else the one that the hub serves.

    `hub` is HOST:PORT, empty if there is no hub; `token` is the run's, which lets the node fetch the model; `tokenizer` says
    whether the node handles text; `download`, whether a hub of the internet may be asked if `hub` is empty. Raises ModelError if the
    model is neither here nor served.
    """
    try:
        source = find_model(name, download=download and not hub)
        if not (hub and digest) or source.digest == digest:
            return source
    except ModelError:
        if not (hub and digest):
            raise
    return Served(name, digest, hub, emit, token, timing, security).source(tokenizer)


class Served:
    """A model that the hub serves: on this machine's disk are the files and tensors that were needed so far."""

    def __init__(
        self,
        name: str,
        digest: str,
        hub: str,
        emit: Emit,
        token: bytes = b"",
        timing: FetchTiming = DEFAULT_FETCH_TIMING,
        security: Security = PLAIN,
    ) -> None:
        self._name, self._digest, self._hub, self._emit, self._timing = name, digest, hub, emit, timing
        self._metadata, self._security = token_metadata(token), security
        self._folder = cache_folder() / "slices" / digest[:32]
        self._tensors = self._folder  # of all models with the same weights, once the description is here
        self._shapes: dict[str, tuple[int, ...]] = {}

    def source(self, tokenizer: bool) -> ModelSource:
        """Returns the model; its small files are on the disk then, those of the tokenizer only if asked for."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / "lock"):
            model = self._model()
            files = [file for file in model.files if file.name == CONFIG or tokenizer]
            if any("/" in file.name for file in files):
                (self._folder / MORE_TEMPLATES).mkdir(exist_ok=True)
            parts = [AnnouncedPart(file.name, file.size_bytes, file.sha256) for file in files]
            fetch_missing(self._folder, parts, functools.partial(self._stream, "", ""))
        self._shapes = {entry.name: tuple(entry.shape) for entry in model.tensors}
        index = {name: TensorEntry(shape, "", name, "") for name, shape in self._shapes.items()}
        self._tensors = cache_folder() / "slices" / model.weights_digest[:32]
        identity = ModelIdentity(files=dict(model.identity), weights_digest=model.weights_digest)
        return ModelSource(self._name, self._folder, index, identity, self._name, read=self._read)

    def _model(self) -> pb.SliceModel:
        """Returns the model's description, from the disk if it is there; checks both alike."""
        note = self._folder / "index"
        if note.is_file():
            try:
                model = pb.SliceModel.FromString(note.read_bytes())
                check_model(model, self._digest)
                return model
            except (ProtocolError, ValueError):
                note.unlink()  # cut short when the power went
        model = self._describe()
        check_model(model, self._digest)
        write_atomically(note, model.SerializeToString())
        return model

    # ---------------------------------------------------------------- tensors

    def _read(self, names: Sequence[str], base: str, compute: str) -> Iterator[tuple[str, Any]]:
        """Reads tensors like model.weights.read_tensors; fetches those that are not here yet."""
        for name in names:
            if name not in self._shapes:
                raise ModelError(f"model {self._name} has no tensor {name}")
        folder = self._tensors / (f"{base}-{compute}" if compute else base)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            manifest = read_manifest(folder, self._digest)
            unknown = [name for name in names if name not in manifest]
            if unknown:
                manifest |= {part.name: part for part in self._list(unknown, base, compute)}
                write_manifest(folder, self._digest, manifest)
            wanted = [part for name in names for part in (manifest[name], manifest.get(f"{name}_scale")) if part]
            began, said = time.monotonic(), self._progress()
            came = fetch_missing(folder, wanted, functools.partial(self._stream, base, compute), progress=said)
        if came:
            received = SliceReceived(
                model=self._name, base=base, tensors=len(wanted), bytes=came,
                slice_bytes=sum(part.size for part in wanted), seconds=round(time.monotonic() - began, 3),
            )  # fmt: skip
            self._emit(received)
        for part in wanted:
            yield part.name, map_tensor(folder, part)

    def _progress(self) -> Callable[[int, int], None]:
        last = [time.monotonic()]

        def say(done: int, total: int) -> None:
            if time.monotonic() - last[0] > self._timing.progress_every_s:
                last[0] = time.monotonic()
                self._emit(SliceComing(model=self._name, bytes=done, of=total))

        return say

    def _list(self, names: Sequence[str], base: str, compute: str) -> list[AnnouncedPart]:
        """Returns what the hub announces for the named tensors. Asks again if the server, which may make them first, is slow."""
        found: dict[str, AnnouncedPart] = {}

        def ask_for_the_rest() -> None:
            last = next(reversed(found), "").removesuffix("_scale")
            for name in (last, f"{last}_scale"):  # the scales of the newest tensor may not have come
                found.pop(name, None)
            left = [name for name in names if name not in found]
            request = self._request(base, compute, [(name, 0) for name in left], False)
            for tensor in self._call("List", request, self._timing.call_s):
                part = AnnouncedPart(tensor.name, tensor.size_bytes, tensor.sha256, tensor.dtype, tuple(tensor.shape))
                check_part(part, self._most_bytes(part.name, left))
                found[part.name] = part

        self._until_answered(ask_for_the_rest, lambda lost: f"{lost}; the slice of {self._name} cannot be fetched")
        lacking = [name for name in names if name not in found]
        if lacking:
            raise ProtocolError(f"the hub announced {len(found)} tensors and left out {lacking[0]}")
        return list(found.values())

    def _most_bytes(self, name: str, asked: Sequence[str]) -> int:
        matrix = name if name in self._shapes else name.removesuffix("_scale")
        if matrix not in asked:
            raise ProtocolError(f"the hub announced {name[:80]!r}, which was not asked for")
        size = 8  # bytes of the widest element
        for length in self._shapes[matrix]:
            size *= length
        return size

    # ---------------------------------------------------------------- calls

    def _describe(self) -> pb.SliceModel:
        (model,) = self._until_answered(
            lambda: list(self._call("Describe", self._request("", "", [], False), self._timing.answer_s)),
            lambda lost: (
                f"model {self._name} is not on this node, and {lost}; `edgelam server` prints where the hub listens, and that "
                "port must be open to this node"
            ),
        )
        return model

    def _stream(self, base: str, compute: str, parts: Sequence[tuple[AnnouncedPart, int]]) -> Iterator[bytes]:
        """Streams the parts' bytes, as a model.served.Stream. Raises PeerLost if the stream breaks."""
        asked = [(part.name, begun) for part, begun in parts]
        for piece in self._call("Fetch", self._request(base, compute, asked, not base), self._timing.call_s):
            if not 0 < len(piece) <= CHUNK_BYTES:
                raise ProtocolError(f"the hub sent a piece of {len(piece)} bytes; at most {CHUNK_BYTES} are allowed")
            yield piece

    def _request(self, base: str, compute: str, parts: Sequence[tuple[str, int]], files: bool) -> pb.SliceRequest:
        named = [pb.SlicePart(name=name, offset=offset, file=files) for name, offset in parts]
        return pb.SliceRequest(model_digest=self._digest, base=base, compute=compute, parts=named)

    def _call(self, method: str, request: pb.SliceRequest, timeout_s: float) -> Iterator[Any]:
        """Yields the answers. Raises Refused with the hub's reason, PeerLost if another try may succeed."""
        with self._security.channel(self._hub, SERVER, _OPTIONS) as channel:
            try:
                answer = stub(channel, SLICES_SERVICE, method)(request, timeout=timeout_s, metadata=self._metadata)
                yield from [answer] if method == "Describe" else answer
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    raise Refused(f"the server's hub at {self._hub} refuses: {error.details()}") from error
                raise PeerLost(
                    f"the server's hub at {self._hub} did not answer {method}: {grpc_reason(error)}"
                ) from error

    def _until_answered(self, ask: Callable[[], T], problem: Callable[[PeerLost], str]) -> T:
        """Returns what `ask` returns. Asks a few times; at last raises EnvironmentProblem with the words of `problem`."""
        for tries in range(self._timing.tries):
            try:
                return ask()
            except PeerLost as lost:
                if tries == self._timing.tries - 1:
                    raise EnvironmentProblem(problem(lost), problem(lost)) from lost
                time.sleep(self._timing.retry_s)
        raise AssertionError("the last try returns or raises")


def check_model(model: pb.SliceModel, digest: str) -> None:
    """Raises ProtocolError unless the hub's description is that of the plan's model, with files that a model needs."""
    if model.model_digest != digest:
        raise ProtocolError(
            f"the hub described model {model.model_digest[:12]!r}, the plan has {digest[:12]}: start the run again"
        )
    names = {file.name for file in model.files}
    listed = listed_files(model.identity)
    missing = sorted(listed - names)
    if digest_of(model.identity) != digest or missing or not re.fullmatch("[0-9a-f]{64}", model.weights_digest):
        raise ProtocolError(f"the hub described model {digest[:12]!r} with other files ({', '.join(missing)[:200]})")
    for file in model.files:
        if file.name != CONFIG and not is_text_file(file.name):
            raise ProtocolError(f"the hub announced a file {file.name[:80]!r}, which no model needs")
        check_part(AnnouncedPart(file.name, file.size_bytes, file.sha256), _MOST_FILE_BYTES)
        if listed and model.identity.get(file.name) != file.sha256:
            raise ProtocolError(f"the hub announced {file.name} with other bytes than the plan's model has")
    if not model.tensors or CONFIG not in names:
        raise ProtocolError("the hub described a model without config.json or tensors")
