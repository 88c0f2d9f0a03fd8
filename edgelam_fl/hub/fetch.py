"""A node's end of the hub's slices: a model whose config and index come first, and each tensor when it is first needed.

What is here already is never asked for, so a node that has its slice needs no hub. Nodes of one machine share the folder.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
from filelock import FileLock

from edgelam_fl.errors import EnvironmentProblem, ModelError, PeerLost, ProtocolError, Refused
from edgelam_fl.files import cache_folder, write_atomically
from edgelam_fl.hub.slices import CHUNK_BYTES, CONFIG, SERVICE, TOKENIZER
from edgelam_fl.model.index import TensorEntry
from edgelam_fl.model.served import AnnouncedPart, check_part, complete, mapped, read_manifest, write_manifest
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.grpc.options import grpc_reason

_CALL_S = 120.0  # of one call; a transfer that takes longer goes on in the next one
_ANSWER_S = 30.0
_TRIES, _RETRY_S = 4, 2.0
_MOST_FILE_BYTES = 64 << 20
_MOST_INDEX_BYTES = 32 << 20
_PROGRESS_EVERY_S = 5.0
_OPTIONS = [
    ("grpc.max_receive_message_length", _MOST_INDEX_BYTES),
    # What is under way is lost where the connection breaks, and comes again. gRPC would let it grow to megabytes; this is
    # enough for 80 Mbit/s at 50 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 512 << 10),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
Emit = Callable[..., None]
T = TypeVar("T")


def open_model(
    name: str, digest: str, hub: str, *, tokenizer: bool = False, emit: Emit = lambda *_, **__: None
) -> ModelSource:
    """The model of a plan: this machine's own where it has it, else served by the hub at `hub` ("": there is none).

    `tokenizer`: whether the node handles text. Raises ModelError where it is neither here nor served.
    """
    try:
        source = find_model(name, download=not hub)
        if not (hub and digest) or source.digest == digest:
            return source
    except ModelError:
        if not (hub and digest):
            raise
    return Served(name, digest, hub, emit).source(tokenizer)


class Served:
    """One model on this machine's disk, as far as it was needed, by what the server's hub has of it."""

    def __init__(self, name: str, digest: str, hub: str, emit: Emit) -> None:
        self._name, self._digest, self._hub, self._emit = name, digest, hub, emit
        self._folder = cache_folder() / "slices" / digest[:32]
        self._shapes: dict[str, tuple[int, ...]] = {}

    def source(self, tokenizer: bool) -> ModelSource:
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / "lock"):
            model = self._model()
            files = [file for file in model.files if file.name == CONFIG or tokenizer]
            parts = [AnnouncedPart(file.name, file.size_bytes, file.sha256) for file in files]
            complete(self._folder, parts, functools.partial(self._stream, "", ""))
        self._shapes = {entry.name: tuple(entry.shape) for entry in model.tensors}
        index = {name: TensorEntry(shape, "", name, "") for name, shape in self._shapes.items()}
        return ModelSource(self._name, self._folder, index, self._digest, self._name, read=self._read)

    def _model(self) -> pb.SliceModel:
        """Kept on disk; what is there is checked like what comes."""
        note = self._folder / "index"
        if note.is_file():
            try:
                return self._checked(pb.SliceModel.FromString(note.read_bytes()))
            except (ProtocolError, ValueError):
                note.unlink()  # cut short with the power
        model = self._checked(self._describe())
        write_atomically(note, model.SerializeToString())
        return model

    def _checked(self, model: pb.SliceModel) -> pb.SliceModel:
        if model.model_digest != self._digest:
            raise ProtocolError(
                f"the hub described model {model.model_digest[:12]!r}, the plan has {self._digest[:12]}: start the run again"
            )
        for file in model.files:
            if file.name not in (CONFIG, *TOKENIZER):
                raise ProtocolError(f"the hub announced a file {file.name[:80]!r}, which no model needs")
            check_part(AnnouncedPart(file.name, file.size_bytes, file.sha256), _MOST_FILE_BYTES)
        if not model.tensors or CONFIG not in {file.name for file in model.files}:
            raise ProtocolError("the hub described a model without config.json or tensors")
        return model

    # ---------------------------------------------------------------- tensors

    def _read(self, names: Sequence[str], base: str, compute: str) -> Iterator[tuple[str, Any]]:
        """As model.weights.read_tensors."""
        for name in names:
            if name not in self._shapes:
                raise ModelError(f"model {self._name} has no tensor {name}")
        folder = self._folder / (f"{base}-{compute}" if compute else base)
        folder.mkdir(exist_ok=True)
        with FileLock(folder / "lock"):
            manifest = read_manifest(folder)
            unknown = [name for name in names if name not in manifest]
            if unknown:
                manifest |= {part.name: part for part in self._list(unknown, base, compute)}
                write_manifest(folder, manifest)
            wanted = [part for name in names for part in (manifest[name], manifest.get(f"{name}_scale")) if part]
            began, said = time.monotonic(), self._progress()
            came = complete(folder, wanted, functools.partial(self._stream, base, compute), progress=said)
        if came:
            self._emit(
                "slice_received", model=self._name, base=base, tensors=len(wanted), bytes=came,
                slice_bytes=sum(part.size for part in wanted), seconds=round(time.monotonic() - began, 3),
            )  # fmt: skip
        for part in wanted:
            yield part.name, mapped(folder, part)

    def _progress(self) -> Callable[[int, int], None]:
        last = [time.monotonic()]

        def say(done: int, total: int) -> None:
            if time.monotonic() - last[0] > _PROGRESS_EVERY_S:
                last[0] = time.monotonic()
                self._emit("slice_coming", model=self._name, bytes=done, of=total)

        return say

    def _list(self, names: Sequence[str], base: str, compute: str) -> list[AnnouncedPart]:
        """What the named tensors will come as. The server may have to make them first, so it is asked again where it is slow."""
        found: dict[str, AnnouncedPart] = {}

        def ask_for_the_rest() -> None:
            last = next(reversed(found), "").removesuffix("_scale")
            for name in (last, f"{last}_scale"):  # the newest one's scales may not have come
                found.pop(name, None)
            left = [name for name in names if name not in found]
            request = self._request(base, compute, [(name, 0) for name in left], False)
            for tensor in self._call("List", request, _CALL_S):
                part = AnnouncedPart(tensor.name, tensor.size_bytes, tensor.sha256, tensor.dtype, tuple(tensor.shape))
                check_part(part, self._most_bytes(part.name, left))
                found[part.name] = part

        _until_answered(ask_for_the_rest, lambda lost: f"{lost}; the slice of {self._name} cannot be fetched")
        lacking = [name for name in names if name not in found]
        if lacking:
            raise ProtocolError(f"the hub announced {len(found)} tensors and left out {lacking[0]}")
        return list(found.values())

    def _most_bytes(self, name: str, asked: Sequence[str]) -> int:
        matrix = name if name in self._shapes else name.removesuffix("_scale")
        if matrix not in asked:
            raise ProtocolError(f"the hub announced {name[:80]!r}, which was not asked for")
        size = 8  # of the widest element
        for length in self._shapes[matrix]:
            size *= length
        return size

    # ---------------------------------------------------------------- calls

    def _describe(self) -> pb.SliceModel:
        (model,) = _until_answered(
            lambda: list(self._call("Describe", self._request("", "", [], False), _ANSWER_S)),
            lambda lost: (
                f"model {self._name} is not on this node, and {lost}; it listens where `edgelam server` says, and that port must "
                "be open to this node"
            ),
        )
        return model

    def _stream(self, base: str, compute: str, parts: Sequence[tuple[AnnouncedPart, int]]) -> Iterator[bytes]:
        """model.served.Stream. Raises PeerLost where it breaks."""
        asked = [(part.name, begun) for part, begun in parts]
        for piece in self._call("Fetch", self._request(base, compute, asked, not base), _CALL_S):
            if not 0 < len(piece) <= CHUNK_BYTES:
                raise ProtocolError(f"the hub sent a piece of {len(piece)} bytes; at most {CHUNK_BYTES} are allowed")
            yield piece

    def _request(self, base: str, compute: str, parts: Sequence[tuple[str, int]], files: bool) -> pb.SliceRequest:
        named = [pb.SlicePart(name=name, offset=offset, file=files) for name, offset in parts]
        return pb.SliceRequest(model_digest=self._digest, base=base, compute=compute, parts=named)

    def _call(self, method: str, request: pb.SliceRequest, timeout_s: float) -> Iterator[Any]:
        """The answers. Raises Refused with the hub's reason, PeerLost for what a repetition may mend."""
        reply = {"Describe": pb.SliceModel.FromString, "List": pb.SliceTensor.FromString, "Fetch": None}[method]
        with grpc.insecure_channel(self._hub, options=_OPTIONS) as channel:
            make = channel.unary_unary if method == "Describe" else channel.unary_stream
            try:
                answer = make(f"/{SERVICE}/{method}", pb.SliceRequest.SerializeToString, reply)(
                    request, timeout=timeout_s
                )
                yield from [answer] if method == "Describe" else answer
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    raise Refused(f"the server's hub at {self._hub} refuses: {error.details()}") from error
                raise PeerLost(
                    f"the server's hub at {self._hub} did not answer {method}: {grpc_reason(error)}"
                ) from error


def _until_answered(ask: Callable[[], T], otherwise: Callable[[PeerLost], str]) -> T:
    """What `ask` returns, asked a few times. Raises EnvironmentProblem with the words of `otherwise` in the end."""
    for tries in range(_TRIES):
        try:
            return ask()
        except PeerLost as lost:
            if tries == _TRIES - 1:
                raise EnvironmentProblem(otherwise(lost)) from lost
            time.sleep(_RETRY_S)
    raise AssertionError("the last try returns or raises")
